"""Groups of the first ranks of a launch, of every size, created in every order."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
import torch.distributed as dist

from distbench.case.spec import Case
from distbench.distributed.session import Session
from distbench.errors import Verdict
from distbench.pipeline.run_case import run_case
from distbench.transport.mori.emulated import shmem
from distbench.transport.mori.world import leave_world
from tests.cases import tiny_case
from tests.ranks import on_ranks

RANKS = 4


def forget_groups(session: Session) -> None:
    """Reset the session to its state before the first subgroup; torch's group counter is not reset."""
    session.enter(RANKS)
    for size in sorted(session._created - {RANKS}):
        if size in session._groups:
            dist.destroy_process_group(session._groups.pop(size).process_group)
        session._created.remove(size)


def sums(session: Session, orders: list[tuple[int, ...]]) -> list[list[int]]:
    """Enter groups of the sizes of each order; return for each order the sum of ranks in every group with this rank."""
    found: list[list[int]] = []
    for order in orders:
        forget_groups(session)
        found.append([])
        for size in order:
            if session.enter(size):
                number = torch.tensor([session.rank + 1])
                dist.all_reduce(number, group=session.group)
                found[-1].append(int(number))
    return found


def test_groups_of_all_sizes_are_created_in_any_order() -> None:
    orders = list(permutations(range(1, RANKS + 1)))
    expected = [
        [[sum(range(1, size + 1)) for size in order if rank < size] for order in orders] for rank in range(RANKS)
    ]
    assert on_ranks(RANKS, sums, orders) == expected


def test_group_that_is_requested_again_is_not_created_again() -> None:
    orders = [order + order[::-1] for order in permutations(range(1, RANKS + 1))]
    assert on_ranks(RANKS, sums, orders)[0] == [[sum(range(1, size + 1)) for size in order] for order in orders]


def verdicts(session: Session, orders: list[tuple[int, ...]], cases: dict[int, Case]) -> list[Verdict]:
    """Run a case on each size of each order; return rank 0's verdicts."""
    found = []
    for order in orders:
        forget_groups(session)
        for size in order:
            outcome = run_case(session, cases[size]) if session.enter(size) else None
            found += [] if outcome is None else [outcome.judgement.verdict]
        leave_world()
    return found


@pytest.mark.parametrize("kernel", ["IntraNode", "AsyncLL"])
def test_worlds_of_emulated_mori_are_created_in_any_order(kernel: str) -> None:
    """The stand-in for mori looks its group up by name, which differs if only the members created the group."""
    sizes = (1, 2, 4)
    orders = list(permutations(sizes))
    cases = {size: tiny_case(size, transport="mori", emulate=True, mori_kernel=kernel, tokens=3) for size in sizes}
    assert on_ranks(RANKS, verdicts, orders, cases)[0] == [Verdict.PASS] * len(sizes) * len(orders)


def unlike_worlds(session: Session) -> list[int]:
    """Join a world of every size as the package is joined, without a session's group; return the worlds' sums."""
    forget_groups(session)
    found = []
    for size in (1, 2, 3):
        if session.enter(size):
            shmem.shmem_init_attr(shmem.MORI_SHMEM_INIT_WITH_UNIQUEID, session.rank, size, bytes([size]) * 128)
            number = torch.ones(1)
            dist.all_reduce(number, group=shmem.world().group)
            found.append(int(number))
            shmem.shmem_finalize()
    return found


def test_emulated_mori_world_uses_the_group_of_the_same_ranks() -> None:
    assert on_ranks(RANKS, unlike_worlds) == [[1, 2, 3], [2, 3], [3], []]
