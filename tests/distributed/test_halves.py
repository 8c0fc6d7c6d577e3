"""Halves of dispatch and combine: which of MoRI's calls they make, and work between them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distbench.case.spec import Case
from distbench.distributed.session import Session
from distbench.errors import DistbenchError
from distbench.pipeline.inputs import workload_for
from distbench.transport.mori.transport import MoriTransport
from distbench.verify.row_compare import same_bits
from tests.cases import tiny_case
from tests.ranks import on_ranks

RANKS = 2


class Watched:
    """An operator that notes the names and the keywords of its calls."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.calls: list[tuple[str, list[str]]] = []

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._inner, name)
        if not name.startswith(("dispatch", "combine")):
            return call

        def noted(*arguments: object, **named: object) -> Any:
            self.calls.append((name, sorted(named)))
            return call(*arguments, **named)

        return noted


@torch.inference_mode()
def calls_of(session: Session, case: Case) -> tuple[list[tuple[str, list[str]]], list[int], bool, list[str]]:
    """MoRI's calls, their number after each half, whether work in between changed nothing, and refused calls."""
    session.enter(case.ep_size)
    transport = MoriTransport(session, case)
    transport._op = watched = Watched(transport._op)
    batch = workload_for(case, session.device).tokens(session.rank)
    whole = transport.combine(transport.dispatch(batch).hidden.clone(), batch.ids)
    watched.calls.clear()
    counts, refused = [], []
    transport.dispatch_send(batch)
    counts.append(len(watched.calls))
    refused += complaints(lambda: transport.combine_send(batch.hidden, batch.ids))
    busy = torch.ones(64, 64) @ torch.ones(64, 64)
    rows = transport.dispatch_recv().hidden.clone()
    counts.append(len(watched.calls))
    refused += complaints(transport.dispatch_recv)
    transport.combine_send(rows, batch.ids)
    counts.append(len(watched.calls))
    busy += busy
    again = transport.combine_recv()
    counts.append(len(watched.calls))
    refused += complaints(transport.combine_recv)
    transport.close()
    return watched.calls, counts, same_bits(whole, again), refused


def complaints(call: Any) -> list[str]:
    try:
        call()
    except DistbenchError as error:
        return [str(error)]
    return []


@pytest.mark.parametrize("kernel", ["AsyncLL", "IntraNode"])
def test_halves_are_mori_s_where_the_kernel_has_them_as_in_sglang(kernel: str) -> None:
    case = tiny_case(RANKS, transport="mori", emulate=True, mori_kernel=kernel, tokens=(5, 3), numerics="exact")
    geometry = ["block_num", "warp_per_block"]
    whole = ["block_num", "rdma_block_num", "warp_per_block"]
    for calls, counts, equal, refused in on_ranks(RANKS, calls_of, case):
        if kernel == "AsyncLL":
            halves = [("dispatch_send", geometry), ("dispatch_recv", []), ("combine_send", geometry)]
            assert calls == [*halves, ("combine_recv", [])]
            assert counts == [1, 2, 3, 4]
        else:
            assert calls == [("dispatch", whole), ("combine", whole)]
            assert counts == [0, 1, 1, 2]
        assert equal
        assert [one.split(" was called")[0] for one in refused] == ["combine()", "dispatch_recv()", "combine_recv()"]
