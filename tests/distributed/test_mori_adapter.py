"""The adapter of MoRI on real ranks: nodes and launches that it reports, and checks that it makes once per routing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import msgspec
import pytest
import torch
from torch import Tensor

from distbench.case.spec import Case
from distbench.distributed.session import Session
from distbench.errors import DistbenchError, Unsupported, Verdict
from distbench.experts import make_experts
from distbench.pipeline.inputs import workload_for
from distbench.pipeline.run_case import run_case
from distbench.transport import make_transport
from distbench.transport.mori import transport as mori
from distbench.transport.mori.emulated import ops
from distbench.transport.mori.transport import MoriTransport
from distbench.transport.mori.world import leave_world
from distbench.verify.records import Outcome
from tests.cases import tiny_case
from tests.host_reads import HostReads
from tests.ranks import on_ranks

NO_CAPTURE = patch("torch.cuda.is_current_stream_capturing", lambda: False)
"""For a device that is faked where torch has none."""


def mori_case(ranks: int = 4, **values: Any) -> Case:
    return tiny_case(ranks, transport="mori", emulate=True, **values)


def facts_of(outcome: Outcome) -> dict[str, Any]:
    assert outcome.judgement.verdict is Verdict.PASS
    assert outcome.gathered is not None
    return outcome.gathered.observations[0].transport


def on_nodes(session: Session, case: Case, nodes: tuple[int, ...]) -> Outcome | None:
    """Run `case` as if each rank were on a node with the number of ranks in `nodes`."""
    session.enter(case.ep_size)
    with patch.object(session, "local_ranks", nodes[session.rank]):
        return run_case(session, case)


@pytest.mark.parametrize(("nodes", "per_node", "kernel"), [((4,) * 4, 4, "IntraNode"), ((2,) * 4, 2, "InterNodeV1LL")])
def test_nodes_of_mori_follow_the_hosts_of_the_launch(nodes: tuple[int, ...], per_node: int, kernel: str) -> None:
    facts = facts_of(on_ranks(4, on_nodes, mori_case(), nodes)[0])
    assert (facts["gpu_per_node"], facts["nodes"], facts["kernel"]) == (per_node, 4 // per_node, kernel)


def test_nodes_with_unequal_rank_counts_are_refused_on_all_ranks() -> None:
    for outcome in on_ranks(4, on_nodes, mori_case(), (3, 3, 3, 1)):
        assert outcome.judgement.verdict is Verdict.INVALID
        assert "ranks disagree on the number of ranks on their nodes: rank 3 unlike rank 0" in str(outcome.judgement)


@pytest.mark.parametrize(
    ("mode", "kernel", "asked", "taken"),
    [
        ("MANUAL", "IntraNode", (80, 0, 16), (80, 0, 16)),
        ("AUTO", "IntraNode", (None, None, None), (128, 0, 16)),
        ("AUTO", "InterNodeV1LL", (None, None, None), (256, 128, 8)),
    ],
)
def test_launched_geometry_is_reported(mode: str, kernel: str, asked: tuple[int, ...], taken: tuple[int, ...]) -> None:
    facts = facts_of(on_ranks(2, on_nodes, mori_case(2, launch_mode=mode, mori_kernel=kernel), (2, 2))[0])
    names = ("block_num", "rdma_block_num", "warp_num_per_block")
    assert tuple(facts[name] for name in names) == asked
    for phase in ("dispatch", "combine"):
        assert facts[f"{phase}_launch"] == dict(zip(names, taken, strict=True))


class FakeOp:
    """An operator of one rank that moves and reads no row."""

    blocks = 80
    rdma_blocks = 0

    def __init__(self, config: Any) -> None:
        rows = config.world_size * config.max_num_inp_token_per_rank
        self._hidden = torch.zeros(rows, config.hidden_dim).bfloat16()
        self._weights = torch.zeros(rows, config.num_experts_per_token)
        self._counter = torch.full((1,), 3, dtype=torch.int32)

    def dispatch(self, *_: object, **__: object) -> tuple[Tensor | None, ...]:
        self._cached_dispatch_launch = (self.blocks, self.rdma_blocks, 16)
        return self._hidden, self._weights, None, self._weights.int(), self._counter

    def get_registered_combine_input_buffer(self, *_: object) -> Tensor:
        return self._hidden.clone()

    def combine(self, rows: Tensor, *_: object, **__: object) -> tuple[Tensor, None]:
        self._cached_combine_launch = (self.blocks, self.rdma_blocks, 16)
        return rows, None


def fake_package() -> SimpleNamespace:
    shmem = SimpleNamespace(
        MORI_SHMEM_INIT_WITH_UNIQUEID=1,
        shmem_get_unique_id=lambda: bytes(128),
        shmem_init_attr=lambda *_: 0,
        shmem_mype=lambda: 0,
        shmem_npes=lambda: 1,
        shmem_finalize=lambda: 0,
    )
    names = {name: getattr(ops, name) for name in ("EpDispatchCombineConfig", "EpDispatchCombineKernelType")}
    return SimpleNamespace(shmem=shmem, ops=SimpleNamespace(EpDispatchCombineOp=FakeOp, **names))


def one_rank(session: Session, case: Case) -> tuple[MoriTransport, Any, Tensor]:
    """Transport over the fake operator, a batch after one pass, and expert rows."""
    session.enter(1)
    with patch.object(mori, "_package", lambda *_: fake_package()):
        transport = MoriTransport(session, case)
    leave_world()
    batch = workload_for(case, session.device).tokens(0)
    rows = torch.zeros(case.capacity, case.hidden_size).bfloat16()
    transport.dispatch(batch)
    transport.combine(rows, batch.ids)
    return transport, batch, rows


def reads_of_a_second_pass(session: Session, case: Case, device: str) -> tuple[int, bool]:
    """Host synchronisations in a second pass of the same batch, and whether total_recv keeps its address."""
    transport, batch, rows = one_rank(session, case)
    first = transport.dispatch(batch).total_recv.data_ptr()
    transport.combine(rows, batch.ids)
    transport._device = torch.device(device)
    with NO_CAPTURE, HostReads() as reads:
        second = transport.dispatch(batch).total_recv.data_ptr()
        transport.combine(rows, batch.ids)
    return reads.count, first == second


@pytest.mark.parametrize("combine_input", ["external", "registered"])
def test_second_pass_of_a_batch_makes_no_host_synchronisation_on_a_device(combine_input: str) -> None:
    case = mori_case(1, combine_input=combine_input)
    assert on_ranks(1, reads_of_a_second_pass, case, "cuda:0") == [(0, True)]
    assert on_ranks(1, reads_of_a_second_pass, case, "cpu")[0][0] > 0


@NO_CAPTURE
def what_is_still_refused(session: Session, case: Case) -> list[str]:
    transport, batch, rows = one_rank(session, case)
    complaints = []
    transport._device = torch.device("cuda", 0)
    transport.dispatch(batch)
    for other in (batch.ids.roll(1, 0), batch.ids[:2]):
        complaints.append(complaint(transport.combine, rows, other))
        transport.dispatch(batch)
    transport.combine(rows, batch.ids.clone())
    complaints.append(complaint(transport.combine, rows, batch.ids))
    transport._device = torch.device("cpu")
    batch.ids[0, 0] = case.num_experts
    complaints.append(complaint(transport.dispatch, batch))
    return complaints


def complaint(function: Any, *arguments: Any) -> str:
    try:
        function(*arguments)
    except DistbenchError as error:
        return str(error)
    return ""


def test_other_or_changed_ids_of_a_known_batch_are_refused() -> None:
    (found,) = on_ranks(1, what_is_still_refused, mori_case(1))
    assert "combine: ids of token 0 are [" in found[0]
    assert "have 2 rows, this rank dispatched 16" in found[1]
    assert "called without a dispatch" in found[2]
    assert "id 4: the last expert is 3" in found[3]


def a_grid_that_does_not_fit(session: Session, case: Case) -> str:
    transport, batch, _ = one_rank(session, case)
    transport._case = msgspec.structs.replace(case, emulate=False)
    properties = SimpleNamespace(multi_processor_count=80)
    with patch.object(torch.cuda, "get_device_properties", lambda _: properties), patch.object(FakeOp, "blocks", 128):
        return complaint(transport.dispatch, batch)


def test_grid_with_more_blocks_than_compute_units_is_refused() -> None:
    (found,) = on_ranks(1, a_grid_that_does_not_fit, mori_case(1, launch_mode="AUTO"))
    assert found.startswith("dispatch: mori: 128 blocks have to run at once, cpu has 80 compute units")
    assert found.endswith("launch_mode = AUTO took them: use MANUAL")


def rdma_blocks_of_a_table(session: Session, case: Case, version: str) -> str:
    transport, batch, rows = one_rank(session, case)
    transport.facts["mori"] = version
    with patch.object(FakeOp, "rdma_blocks", 42):
        found = complaint(transport.dispatch, batch)
        if not found:
            transport.combine(rows, batch.ids)
    return found


@pytest.mark.parametrize(
    ("kernel", "version", "told"),
    [
        ("InterNodeV1", "1.2.2", "dispatch: rdma_block_num 42: InterNodeV1 of mori 1.2.2 drops and doubles rows"),
        ("InterNodeV1", "1.2.4", ""),
        ("InterNodeV1LL", "1.2.2", ""),
    ],
)
def test_rdma_block_count_that_loses_rows_in_a_release_is_refused(kernel: str, version: str, told: str) -> None:
    case = mori_case(1, launch_mode="AUTO", mori_kernel=kernel)
    (found,) = on_ranks(1, rdma_blocks_of_a_table, case, version)
    assert found.startswith(told)
    assert bool(found) == bool(told)


def stages_of_parts(session: Session, case: Case) -> list[str]:
    """Stages in which experts and transport are made, with stand-ins for packages that are not installed."""
    seen: list[str] = []
    stand_ins = msgspec.structs.replace(case, emulate=True)

    def experts(_: Case) -> Any:
        seen.append(session.heartbeat.position().stage_name)
        return make_experts(stand_ins)

    def transport(session: Session, _: Case, *counts_and_batch: Any) -> Any:
        seen.append(session.heartbeat.position().stage_name)
        return make_transport(session, stand_ins, *counts_and_batch)

    with (
        patch("distbench.pipeline.run_case.make_experts", experts),
        patch("distbench.pipeline.run_case.make_transport", transport),
    ):
        session.enter(case.ep_size)
        run_case(session, case)
    return seen


@pytest.mark.parametrize(
    ("values", "stage"),
    [
        ({"transport": "mori", "experts": "aiter"}, "compile"),
        ({"transport": "mori", "experts": "reference"}, "compile"),
        ({"transport": "collective", "experts": "aiter"}, "compile"),
        ({"transport": "mori", "experts": "aiter", "emulate": True}, "workload"),
    ],
)
def test_packages_are_imported_and_compiled_in_the_stage_with_the_compile_limit(
    values: dict[str, Any], stage: str
) -> None:
    assert on_ranks(1, stages_of_parts, tiny_case(1, **values)) == [[stage, stage]]


def without_the_package(session: Session, case: Case, rank: int) -> Outcome | None:
    """Run `case` with the package missing on one rank's node, or with an unsupported device there."""
    stand_ins = msgspec.structs.replace(case, emulate=True)

    def experts(_: Case) -> Any:
        if session.rank == rank:
            message = "experts aiter: not here"
            raise Unsupported(message)
        return make_experts(stand_ins)

    with patch("distbench.pipeline.run_case.make_experts", experts):
        session.enter(case.ep_size)
        return run_case(session, case)


@pytest.mark.parametrize("rank", [0, 1])
def test_package_missing_on_one_rank_is_refused_on_all_ranks_with_its_reason(rank: int) -> None:
    outcomes = on_ranks(2, without_the_package, tiny_case(2, experts="aiter"), rank)
    for here, outcome in enumerate(outcomes):
        assert outcome.judgement.verdict is Verdict.UNSUPPORTED
        told = "experts aiter: not here" if here == rank else f"rank {rank}: experts aiter: not here"
        assert [reason.message for reason in outcome.judgement.reasons] == [told]
