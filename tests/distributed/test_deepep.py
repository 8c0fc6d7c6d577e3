"""Transport deepep on real ranks: released Python of deep_ep over kernels in torch (tests/fake_deep_ep.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distbench.case.resolve import FLAGS, Layer, resolve_case
from distbench.case.spec import Case
from distbench.case.stages import Stage
from distbench.case.suite import load_suite
from distbench.distributed.session import Session
from distbench.errors import DistbenchError, Verdict
from distbench.pipeline.run_case import run_case
from distbench.report.bundle.recorded import moves_local_slots, recorded_order
from distbench.testing.conformance import RULES, SUITE
from distbench.transport.sum_order import SumOrder
from distbench.verify.records import Outcome
from tests import fake_deep_ep
from tests.contract.wheels import deep_ep_wheel
from tests.end_to_end.launches import SOAK
from tests.ranks import on_ranks

MODES = ("normal", "low-latency")
PLUGIN = "tests.fake_deep_ep:PLUGIN"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("deep_ep")
    with deep_ep_wheel() as wheel:
        fake_deep_ep.unpack(wheel, path)
    return path


def deepep(folder: Path, ranks: int, mode: str, spoils: str = "", **values: Any) -> Case:
    flags = {
        "model": "custom",
        "hidden_size": 512,
        "intermediate_size": 128,
        "num_experts": 16,
        "topk": 6,
        "max_dispatch_tokens_per_rank": 32,
        "tokens": (7, 0, 16, 3)[:ranks],
        "device": "cpu",
        "transport": PLUGIN,
        "transport_option": f"folder={folder};mode={mode};spoils={spoils}",
    }
    return resolve_case([Layer(FLAGS, flags | values)], ranks).case


def outcome_of(session: Session, case: Case) -> Outcome | None:
    return run_case(session, case)


def outcome(case: Case) -> Outcome:
    found = on_ranks(case.ep_size, outcome_of, case)[0]
    assert isinstance(found, Outcome)
    return found


@pytest.mark.parametrize(
    ("ranks", "mode", "dtype"),
    [(4, "normal", "bf16"), (2, "normal", "fp8"), (2, "low-latency", "bf16"), (4, "low-latency", "bf16")],
)
def test_case_passes_with_both_inputs_and_states_order_and_slots(
    folder: Path, ranks: int, mode: str, dtype: str
) -> None:
    found = outcome(deepep(folder, ranks, mode, dispatch_dtype=dtype, repeats=2))
    assert found.judgement.verdict is Verdict.PASS, found.judgement.reasons
    assert found.gathered is not None
    facts = found.gathered.observations[0].transport
    assert moves_local_slots(facts)
    assert recorded_order(facts) == SumOrder(by_rank=mode == "normal")


@pytest.mark.skipif(not SOAK, reason="long: set DISTBENCH_SOAK=1")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rule", RULES)
def test_rules_of_conformance_hold(folder: Path, rule: str, mode: str) -> None:
    flags = {"device": "cpu", "transport": PLUGIN, "transport_option": f"folder={folder};mode={mode}"}
    wide = {"hidden_size": 512} if mode == "low-latency" else {}
    entry = {one.name: one for one in load_suite(SUITE, 2, [Layer(FLAGS, flags | wide)]).entries}[rule]
    wanted = {"overflow": Verdict.OVERFLOW, "lossy-cut": Verdict.UNDER_LIMIT}
    if (rule, mode) == ("fp8", "low-latency"):
        wanted["fp8"] = Verdict.UNSUPPORTED
    assert outcome(entry.case).judgement.verdict is wanted.get(rule, Verdict.PASS)


@pytest.mark.parametrize("mode", MODES)
def test_shared_experts_and_ids_of_minus_one_pass(folder: Path, mode: str) -> None:
    found = outcome(deepep(folder, 2, mode, shared_experts=1, dropped_slots=0.3, dropped_tokens=0.2, numerics="exact"))
    assert found.judgement.verdict is Verdict.PASS, found.judgement.reasons


@pytest.mark.parametrize(
    ("mode", "spoils", "stage"),
    [
        ("normal", "row", Stage.DISPATCH),
        ("normal", "sum", Stage.COMBINE),
        ("low-latency", "row", Stage.DISPATCH),
        ("low-latency", "sum", Stage.COMBINE),
    ],
)
def test_bug_of_a_kernel_is_attributed_to_its_stage_and_rank(
    folder: Path, mode: str, spoils: str, stage: Stage
) -> None:
    found = outcome(deepep(folder, 2, mode, spoils, numerics="exact"))
    assert found.judgement.verdict is Verdict.BASELINE_WRONG
    assert found.judgement.first_divergence is not None
    assert (found.judgement.first_divergence.stage, found.judgement.first_divergence.rank) == (stage, 0)


def error_of(session: Session, case: Case) -> str:
    try:
        run_case(session, case)
    except DistbenchError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("spoils", "told"), [("token", "received a token twice"), ("count", "its ranges")])
def test_blocks_that_contradict_themselves_are_refused(folder: Path, spoils: str, told: str) -> None:
    assert told in on_ranks(1, error_of, deepep(folder, 1, "low-latency", spoils, tokens=(9,), numerics="exact"))[0]
