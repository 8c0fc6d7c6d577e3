"""The collective transport against a plain model of what it must do, on real ranks; on a device, against the CPU."""

from __future__ import annotations

import warnings
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from distbench.case.spec import Case
from distbench.distributed.all_to_all import AllToAll
from distbench.distributed.session import Session
from distbench.errors import DistbenchError
from distbench.pipeline.inputs import workload_for
from distbench.transport import make_transport
from distbench.transport.base import POISON_ID
from distbench.transport.collective import transport as collective
from distbench.transport.collective.arrival import Geometry
from distbench.transport.collective.transport import CollectiveTransport
from distbench.workload.batch import TokenBatch
from distbench.workload.bits import shuffle
from distbench.workload.routing import destinations, recv_counts
from tests.cases import tiny_case
from tests.ranks import on_ranks

CALLS = 6
ALONE = AllToAll(None)  # type: ignore[arg-type] # a rank that is alone exchanges nothing


def same(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))


def awkward(rows: int, columns: int, seed: int) -> Tensor:
    """bf16 rows whose sums depend on the order of additions: large numbers that cancel, and zeros of both signs."""
    generator = torch.Generator().manual_seed(seed)
    choices = torch.tensor([2.0**30, -(2.0**30), 1.0, 3.0, 0.0, -0.0, -0.0], dtype=torch.bfloat16)
    values = choices[torch.randint(len(choices), (rows, columns), generator=generator)]
    values[torch.rand(rows, generator=generator) < 0.2] = -0.0
    return values


def transport_of(session: Session, case: Case) -> tuple[CollectiveTransport, TokenBatch, Tensor]:
    session.use("cpu")
    batch = workload_for(case, session.device).tokens(session.rank)
    sent = recv_counts(batch.ids, case.experts_per_rank, case.ep_size)
    counts = session.agree("0" * 64, sent.new_zeros(1), sent)
    transport = make_transport(session, case, counts, batch)
    assert isinstance(transport, CollectiveTransport)
    return transport, batch, counts


def results(source_rank: int, token: int, destination: int, call: int, columns: int) -> Tensor:
    """Expert rows of a token on `destination`, [columns]: a function of the arguments, so any rank can compute it."""
    return awkward(1, columns, ((source_rank * 1000 + token) * 16 + destination) * 16 + call)[0]


@torch.inference_mode()
def passes(session: Session, case: Case) -> list[str]:
    """Errors of several passes: in received rows, their sources, their order, and combined tokens."""
    transport, _, counts = transport_of(session, case)
    workload, rank, wrong = workload_for(case, session.device), session.rank, []
    everyone = [workload.tokens(peer) for peer in range(case.ep_size)]
    total = int(counts[:, rank].sum())
    for call in range(CALLS):
        dispatched = transport.dispatch(everyone[rank])
        sources = transport.sources().tolist()
        arrived = [
            (peer, token)
            for peer, batch in enumerate(everyone)
            for token in destinations(batch.ids, case.experts_per_rank, case.ep_size)[:, rank].nonzero()[:, 0].tolist()
        ]
        order = shuffle(case.seed, f"slots/{call}", rank, total, "cpu").tolist()
        expected = sorted(range(total), key=order.__getitem__) if case.slot_order == "shuffled" else range(total)
        if [tuple(one) for one in sources] != [arrived[index] for index in expected]:
            wrong.append(f"sources of call {call}")
        for field in ("hidden", "scales", "weights", "ids"):
            buffer = getattr(dispatched, field)
            rows = [getattr(everyone[peer], field)[token] for peer, token in sources] if buffer is not None else []
            if rows and not same(buffer[:total], torch.stack(rows)):
                wrong.append(f"{field} of call {call}")
        kept = [total, case.capacity, total // 2, 0][call % 4]
        made = [results(peer, token, rank, call, case.hidden_size) for peer, token in sources[:kept]]
        out = torch.zeros(kept, case.hidden_size, dtype=torch.bfloat16)
        for row, result in zip(out, made, strict=False):
            row[:] = result
        kept_by = [[tuple(one) for one in kept_rows] for kept_rows in session_lists(session, sources[:kept])]
        combined = transport.combine(out, everyone[rank].ids.clone() if call % 2 else everyone[rank].ids)
        if not same(combined, ordered_sums(case, everyone[rank], rank, kept_by, call)):
            wrong.append(f"combine of call {call}")
    return wrong


def session_lists(session: Session, mine: list[list[int]]) -> list[Any]:
    lists: list[Any] = [None] * session.world_size
    torch.distributed.all_gather_object(lists, mine, group=session.group)
    return lists


def ordered_sums(case: Case, batch: TokenBatch, rank: int, kept_by: list[list[tuple[int, int]]], call: int) -> Tensor:
    sums = torch.zeros(batch.ids.shape[0], case.hidden_size)
    for token, ids in enumerate(batch.ids.tolist()):
        for owner in dict.fromkeys(expert // case.experts_per_rank for expert in ids):
            kept = (rank, token) in kept_by[owner]
            sums[token] += results(rank, token, owner, call, case.hidden_size) if kept else torch.nan
    return sums.to(torch.bfloat16)


@torch.inference_mode()
def changed_ids(session: Session, case: Case) -> str:
    transport, batch, _ = transport_of(session, case)
    transport.dispatch(batch)
    transport.combine(torch.zeros(case.capacity, case.hidden_size, dtype=torch.bfloat16), batch.ids)
    batch.ids[:] = torch.arange(case.topk)
    try:
        transport.dispatch(batch)
    except DistbenchError as error:
        return str(error)
    return ""


@torch.inference_mode()
def foreign_ids(session: Session, case: Case) -> list[bool]:
    """Flags of tokens whose sum is NaN although they went to rank 0, or else a number; and whether all went."""
    transport, batch, _ = transport_of(session, case)
    transport.dispatch(batch)
    out = torch.zeros(case.capacity, case.hidden_size, dtype=torch.bfloat16)
    combined = transport.combine(out, torch.zeros_like(batch.ids))
    went = destinations(batch.ids, case.experts_per_rank, case.ep_size)[:, 0]
    return [bool(one) for one in (combined.isnan().all(1) != ~went)] + [bool(went.all())]


@torch.inference_mode()
def lost_on_the_way(session: Session, case: Case) -> list[bool]:
    """Return whether rows that do not arrive, after a call in which the same did, are missed: sources, then tokens."""
    transport, batch, counts = transport_of(session, case)
    out = torch.ones(case.capacity, case.hidden_size, dtype=torch.bfloat16)
    transport.dispatch(batch)
    transport.combine(out, batch.ids)
    exchange, transport._exchange = transport._exchange, lambda *_, **__: ()  # type: ignore[method-assign]
    transport.dispatch(batch)
    strangers = transport.sources()[:, 1] == POISON_ID
    transport._exchange = exchange  # type: ignore[method-assign]
    transport.combine(out, batch.ids)
    transport.dispatch(batch)
    transport._exchange = lambda *_, **__: ()  # type: ignore[method-assign]
    missed = transport.combine(out, batch.ids).isnan().any(1)
    away = destinations(batch.ids, case.experts_per_rank, case.ep_size)
    away[:, session.rank] = False
    peers = int(counts[:, session.rank].sum() - counts[session.rank, session.rank])
    return [int(strangers.sum()) == peers > 0, torch.equal(missed, away.any(1))]


def test_row_that_does_not_arrive_is_not_replaced_by_a_stale_one() -> None:
    assert on_ranks(4, lost_on_the_way, tiny_case(4)) == [[True, True]] * 4


@pytest.mark.parametrize("slot_order", ["shuffled", "source"])
@pytest.mark.parametrize(
    ("world", "changes"),
    [
        (1, {}),
        (2, {"tokens": (0, 5)}),
        (2, {"routing": "local"}),
        (4, {"routing": "fan-in:1"}),
        (4, {"tokens": 1, "topk": 1}),
        (4, {"dispatch_dtype": "fp8"}),
        (4, {"dispatch_dtype": "fp8", "fp8_format": "e4m3fnuz"}),
        (4, {"topk": 3, "routing": "duplicates"}),
    ],
)
def test_rows_and_sums_equal_those_of_the_model(world: int, changes: dict[str, Any], slot_order: str) -> None:
    case = tiny_case(world, **changes, slot_order=slot_order)
    assert on_ranks(world, passes, case) == [[]] * world
    assert on_ranks(world, without_shared_memory, passes, case) == [[]] * world


@torch.inference_mode()
def how_rows_travel(session: Session, case: Case) -> list[str]:
    return [str(transport_of(session, case)[0].facts["kernel"]), *without_shared_memory(session, _kernel, case)]


def _kernel(session: Session, case: Case) -> list[str]:
    return [str(transport_of(session, case)[0].facts["kernel"])]


def without_shared_memory(session: Session, function: Any, case: Case) -> Any:
    """Call `function` as on several hosts, where no rank shares memory with all others."""
    with patch.object(session, "shared", None):
        return function(session, case)


@pytest.mark.parametrize(
    ("changes", "elsewhere"),
    [({}, "all_to_all"), ({"routing": "fan-in:1"}, "send_recv"), ({"tokens": 1, "topk": 1}, "send_recv")],
)
def test_rows_travel_by_shared_memory_or_by_the_collective_that_fits_the_routing(
    changes: dict[str, Any], elsewhere: str
) -> None:
    assert on_ranks(4, how_rows_travel, tiny_case(4, **changes)) == [["shared_memory", elsewhere]] * 4


def test_combine_of_a_row_that_was_never_sent_is_poison() -> None:
    for flags in on_ranks(4, foreign_ids, tiny_case(4, topk=2)):
        assert not any(flags)


def test_ids_that_changed_in_place_are_refused() -> None:
    told = on_ranks(2, changed_ids, tiny_case(2))
    assert all("the ids changed after the ranks agreed" in one for one in told)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", ["triton", "torch"])
@pytest.mark.parametrize(
    "payload", [{}, {"dispatch_dtype": "fp8"}, {"dispatch_dtype": "fp8", "fp8_format": "e4m3fnuz"}], ids=str
)
@torch.inference_mode()
def test_transport_on_a_device_gives_the_bits_of_the_cpu(
    payload: dict[str, str], rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if rows == "torch":
        monkeypatch.setattr(collective, "find_spec", lambda _: None)
    case = tiny_case(1, topk=3, **payload)
    ends: dict[str, list[Tensor]] = {}
    for device in ("cpu", "cuda"):
        batch = workload_for(case, torch.device(device)).tokens(0)
        counts = recv_counts(batch.ids, case.experts_per_rank, 1).cpu().unsqueeze(0)
        geometry = Geometry(0, 1, case.num_experts, case.capacity, counts)
        transport = CollectiveTransport(ALONE, geometry, batch, seed=7, shuffled=True)
        ends[device] = []
        for call in range(CALLS):
            ends[device] += [part.clone() for part in transport.dispatch(batch) if part is not None]
            ends[device].append(transport.sources())
            kept = [int(counts.sum()), case.capacity, 3, 0][call % 4]
            combined = transport.combine(awkward(kept, case.hidden_size, call).to(device), batch.ids)
            ends[device] += [combined.isnan(), combined.nan_to_num()]
    assert all(same(ours.cpu(), theirs) for ours, theirs in zip(ends["cuda"], ends["cpu"], strict=True))


@pytest.mark.gpu
@torch.inference_mode()
def test_pass_on_a_device_makes_no_host_synchronisation() -> None:
    case = tiny_case(1)
    batch = workload_for(case, torch.device("cuda")).tokens(0)
    counts = recv_counts(batch.ids, case.experts_per_rank, 1).cpu().unsqueeze(0)
    geometry = Geometry(0, 1, case.num_experts, case.capacity, counts)
    transport = CollectiveTransport(ALONE, geometry, batch, seed=7, shuffled=True)
    out = torch.zeros(case.capacity, case.hidden_size, dtype=torch.bfloat16, device="cuda")
    transport.dispatch(batch)
    transport.combine(out, batch.ids)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        transport.dispatch(batch)
        transport.combine(out, batch.ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")
