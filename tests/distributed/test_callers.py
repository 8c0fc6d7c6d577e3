"""SGLang's lifted code over the stand-ins on real ranks: the oracle's bits, and the rows given to `fused_moe`."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from distbench.callers import make_caller
from distbench.callers.setting import Setting
from distbench.case.limits import Traffic, resolve_limit
from distbench.case.spec import Case
from distbench.distributed.session import Session
from distbench.experts.aiter.adapter import make_aiter_experts
from distbench.experts.base import ExpertInput, ExpertWeights
from distbench.pipeline.inputs import workload_for
from distbench.pipeline.recv_bound import parse_sender_rows
from distbench.transport import make_transport
from distbench.transport.mori.config import production_kernel
from distbench.workload.routing import recv_counts
from tests.cases import tiny_case
from tests.ranks import on_ranks
from tests.slim_wheel import slim_wheel

FREE = {"model": "custom", "hidden_size": 256, "intermediate_size": 128, "num_experts": 8, "topk": 4}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> str:
    return slim_wheel(tmp_path_factory.mktemp("sglang"))


class Ran(NamedTuple):
    """One pass of a rank: rows given to `fused_moe`, total_recv, wrong tokens, and arguments unlike distbench's."""

    rows: int
    received: int
    wrong: int
    differing: dict[str, tuple[str, str]]


@torch.inference_mode()
def passed(session: Session, case: Case, wheel: str) -> Ran:
    """One pass of the caller over the case's transport."""
    session.use("cpu")
    workload = workload_for(case, session.device)
    batch = workload.tokens(session.rank)
    sent = recv_counts(batch.ids, case.experts_per_rank, case.ep_size)
    counts = session.agree("0" * 64, sent.new_zeros(1), sent)
    transport = make_transport(session, case, counts, batch)
    experts = make_aiter_experts(case)
    traffic = Traffic(case.tokens, tuple(counts.sum(0).tolist()), case.capacity)
    setting = Setting(
        case=case,
        rank=session.rank,
        device=session.device,
        limit=resolve_limit(case.limit, traffic),
        kernel=production_kernel(case),
        sender_rows=parse_sender_rows(case),
    )
    mask = torch.zeros(case.num_experts, dtype=torch.int32)
    mask[session.rank * case.experts_per_rank :][: case.experts_per_rank] = 1
    weights = ExpertWeights(*workload.local_weights(session.rank), mask)
    layer = make_caller("sglang", wheel, setting, experts).start(batch, weights, transport)
    received = int(layer.dispatch().total_recv)
    layer.cut()

    def check(given: ExpertInput) -> None:
        experts.check(given, weights)

    call = layer.experts(check)
    tokens = layer.combine()
    transport.close()
    expected = workload.expected(batch)
    assert expected is not None
    wrong = (tokens.view(torch.int16) != expected.view(torch.int16)).any(1).sum()
    return Ran(call.given.rows, received, int(wrong), call.differing)


def ran(wheel: str, ranks: int, **values: Any) -> list[Ran]:
    case = tiny_case(ranks, **FREE | {"experts": "aiter", "emulate": True, "limit": "off"} | values)
    return on_ranks(ranks, passed, case, wheel)


@pytest.mark.parametrize(
    ("values", "rows"),
    [
        ({"tokens": [5, 7]}, [128, 128]),
        ({"tokens": [5, 7], "limit": "24"}, [24, 24]),
        ({"tokens": [5, 7], "limit": "19"}, [19, 19]),
        ({"tokens": [5, 7], "limit": "100000"}, [128, 128]),
        ({"tokens": [5, 7], "recv_bound": True}, [32, 32]),
        ({"tokens": [20, 33], "recv_bound": True}, [64, 64]),
        ({"tokens": [5, 7], "recv_bound": True, "sender_rows": "5,9"}, [32, 128]),
        ({"tokens": [5, 7], "recv_bound": True, "tp_size": 4}, [128, 128]),
        ({"tokens": [5, 7], "recv_bound": True, "two_batch_overlap": True}, [128, 128]),
        ({"tokens": [5, 7], "recv_bound": True, "mori_kernel": "IntraNodeLL"}, [128, 128]),
        ({"tokens": [5, 7], "recv_bound": True, "limit": "24"}, [24, 24]),
        ({"tokens": [5, 7], "limit": "24", "dispatch_dtype": "fp8"}, [24, 24]),
        ({"tokens": [0, 7], "recv_bound": True}, [32, 32]),
        ({"tokens": [0, 7], "recv_bound": True, "dispatch_dtype": "fp8"}, [32, 32]),
        ({"tokens": [0, 0], "recv_bound": True}, [128, 128]),
    ],
    ids=str,
)
@pytest.mark.parametrize("transport", ["collective", "mori"])
def test_rows_given_to_fused_moe_and_bits_on_two_ranks(
    wheel: str, transport: str, values: dict[str, Any], rows: list[int]
) -> None:
    found = ran(wheel, 2, transport=transport, **values)
    assert [one.rows for one in found] == rows
    assert [one.wrong for one in found] == [0, 0]


@pytest.mark.parametrize("ranks", [4, 8])
@pytest.mark.parametrize(
    ("values", "rows"),
    [
        ({}, "full"),
        ({"limit": "sum"}, "sum"),
        ({"recv_bound": True}, "bound"),
        ({"recv_bound": True, "dispatch_dtype": "fp8", "transport": "mori"}, "bound"),
    ],
    ids=str,
)
def test_rows_given_to_fused_moe_and_bits_with_idle_ranks(
    wheel: str, ranks: int, values: dict[str, Any], rows: str
) -> None:
    tokens = [0, *(1 + 5 * rank % 9 for rank in range(1, ranks))]
    found = ran(wheel, ranks, tokens=tokens, **values)
    total = sum(tokens)
    expected = {"full": 64 * ranks, "sum": total, "bound": -(-total // 32) * 32}[rows]
    assert [(one.rows, one.wrong) for one in found] == [(expected, 0)] * ranks


def test_arguments_of_fused_moe_that_differ_from_distbenchs_are_known(wheel: str) -> None:
    found = ran(wheel, 2, tokens=[5, 7], limit="24", dispatch_dtype="fp8")
    assert [one.differing for one in found] == [{"moe_sorting_dispatch_policy": ("2", "0")}] * 2
