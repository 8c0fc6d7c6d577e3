"""The arm production with SGLang's released text on real ranks: the oracle's bits, and the rows of `fused_moe`."""

from __future__ import annotations

import importlib
import sys
import weakref
import zipfile
from pathlib import Path
from typing import Any

import msgspec
import pytest

from distbench.callers.sglang.definitions import DISPATCHER
from distbench.callers.text import CallerUse
from distbench.case.sglang_releases import NEWEST
from distbench.case.spec import Case
from distbench.distributed.session import Session
from distbench.errors import Verdict
from distbench.experts import make_experts
from distbench.experts.base import Experts, ExpertWeights
from distbench.pipeline import run_case as run_case_module
from distbench.pipeline.run_case import run_case
from distbench.verify.records import Outcome
from distbench.workload.inputs import Workload
from tests.cases import tiny_case
from tests.ranks import on_ranks
from tests.slim_wheel import atom_folder, slim_wheel, vllm_wheel

FREE = {"model": "custom", "hidden_size": 256, "intermediate_size": 128, "num_experts": 8, "topk": 4}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> str:
    return slim_wheel(tmp_path_factory.mktemp("sglang"))


def outcome_of(session: Session, case: Case) -> Outcome | None:
    return run_case(session, case)


def outcome(wheel: str, ranks: int, **values: Any) -> Outcome:
    defaults = {"experts": "aiter", "emulate": True, "limit": "off"}
    case = msgspec.structs.replace(tiny_case(ranks, **FREE | defaults | values), caller="sglang", caller_wheel=wheel)
    found: Outcome | None = on_ranks(ranks, outcome_of, case)[0]
    assert found is not None
    return found


def passed(wheel: str, ranks: int, **values: Any) -> list[CallerUse]:
    """What the caller did on each rank, in a case that passes: production has the oracle's bits."""
    found = outcome(wheel, ranks, **values)
    assert found.judgement.verdict is Verdict.PASS, found.judgement
    assert found.gathered is not None
    assert found.gathered.comparisons["production/oracle"].equal
    uses = [record.caller for record in found.gathered.observations]
    assert all(use is not None for use in uses)
    return [use for use in uses if use is not None]


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
        ({"tokens": [5, 7], "limit": "24", "transport": "mori", "combine_input": "registered"}, [24, 24]),
        ({"tokens": [5, 7], "recv_bound": True, "transport": "mori", "mori_kernel": "AsyncLL"}, [32, 32]),
    ],
    ids=str,
)
def test_rows_given_to_fused_moe_and_bits_on_two_ranks(wheel: str, values: dict[str, Any], rows: list[int]) -> None:
    assert [use.rows for use in passed(wheel, 2, **values)] == rows


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
    total = sum(tokens)
    expected = {"full": 64 * ranks, "sum": total, "bound": -(-total // 32) * 32}[rows]
    assert [use.rows for use in passed(wheel, ranks, tokens=tokens, **values)] == [expected] * ranks


@pytest.mark.parametrize("stale", ["5,9", "9,7"])
def test_rank_with_stale_metadata_does_not_cut_in_both_kinds_of_inputs(wheel: str, stale: str) -> None:
    uses = passed(wheel, 2, tokens=[5, 7], recv_bound=True, sender_rows=stale, numerics="both")
    assert sorted(use.rows for use in uses) == [32, 128]


def experts_that_live_as_weights_are_made(session: Session, case: Case) -> list[int]:
    """Experts of other inputs that are still held each time that the case makes weights."""
    made: list[weakref.ref[Experts]] = []
    alive: list[int] = []

    def make(chosen: Case) -> Experts:
        experts = make_experts(chosen)
        made.append(weakref.ref(experts))
        return experts

    def weigh(session: Session, chosen: Case, workload: Workload) -> ExpertWeights:
        alive.append(sum(one() is not None for one in made))
        return weights(session, chosen, workload)

    weights = run_case_module._weights
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_case_module, "make_experts", make)
        patch.setattr(run_case_module, "_weights", weigh)
        for _ in range(2):
            run_case(session, case)
    return alive


@pytest.mark.parametrize("caller", ["own", "sglang", "vllm", "atom"])
def test_experts_of_one_kind_of_inputs_are_freed_before_the_next_weights_are_made(
    wheel: str, tmp_path: Path, caller: str
) -> None:
    texts = {
        "own": {},
        "sglang": {"caller_wheel": wheel},
        "vllm": {"caller_wheel": vllm_wheel(tmp_path)},
        "atom": {"caller_folder": atom_folder(tmp_path)},
    }
    values = FREE | {"experts": "aiter", "emulate": True, "limit": "off", "numerics": "both", "tokens": [5, 7]}
    case = msgspec.structs.replace(tiny_case(2, **values), caller=caller, **texts[caller])
    assert on_ranks(2, experts_that_live_as_weights_are_made, case) == [[0] * 4] * 2


def test_arguments_of_fused_moe_that_differ_from_distbenchs_are_known(wheel: str) -> None:
    uses = passed(wheel, 2, tokens=[5, 7], limit="24", dispatch_dtype="fp8")
    assert [use.differing for use in uses] == [{"moe_sorting_dispatch_policy": ("2", "0")}] * 2


def test_limit_below_total_recv_is_refused_before_production_runs(wheel: str) -> None:
    found = outcome(wheel, 2, tokens=[20, 33], limit="24")
    assert found.judgement.verdict is Verdict.UNDER_LIMIT
    assert found.gathered is not None
    assert "production" not in found.gathered.observations[0].kernels


def test_unchecked_limit_below_total_recv_loses_the_same_rows_in_production(wheel: str) -> None:
    found = outcome(wheel, 2, tokens=[20, 33], limit="24", policy="unchecked", slot_order="source")
    assert found.judgement.verdict is Verdict.UNDER_LIMIT
    assert found.gathered is not None
    assert found.gathered.comparisons["truncated/production"].equal


def test_release_without_a_definition_is_unsupported_on_all_ranks(wheel: str) -> None:
    missing = slim_wheel(Path(wheel).parent, {DISPATCHER: ("def mori_recv_bound(", "def recv_bound(")}, "missing")
    found = outcome(missing, 2)
    assert found.judgement.verdict is Verdict.UNSUPPORTED
    assert f"sglang {NEWEST}: {DISPATCHER} does not define mori_recv_bound" in found.judgement.reasons[0].message


def test_rules_of_another_release_than_the_callers_are_refused(wheel: str) -> None:
    found = outcome(wheel, 2, sglang_version="0.5.22")
    assert found.judgement.verdict is Verdict.INVALID
    assert f"the caller is sglang {NEWEST}" in found.judgement.reasons[0].message


def outcome_of_installed(session: Session, case: Case, folders: list[str]) -> Outcome | None:
    """The outcome where each rank's sglang is the one in its folder."""
    sys.path.insert(0, folders[session.rank])
    importlib.invalidate_caches()
    try:
        return run_case(session, case)
    finally:
        sys.path.remove(folders[session.rank])
        assert "sglang" not in sys.modules


def unpacked(wheel: str, folder: Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    (folder / "sglang" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    return str(folder)


def test_installed_package_is_lifted_and_must_be_the_same_on_all_ranks(wheel: str, tmp_path: Path) -> None:
    align = "    align = MORI_LOGICAL_RECV_ROW_ALIGN\n"
    other = slim_wheel(tmp_path, {DISPATCHER: (align, f"{align}    # a patched node\n")})
    folders = [unpacked(wheel, tmp_path / "first"), unpacked(other, tmp_path / "second")]
    values = {"experts": "aiter", "emulate": True, "tokens": [5, 7]}
    case = msgspec.structs.replace(tiny_case(2, **FREE | values), caller="sglang")
    alike: Outcome | None = on_ranks(2, outcome_of_installed, case, [folders[0]] * 2)[0]
    unlike: Outcome | None = on_ranks(2, outcome_of_installed, case, folders)[0]
    assert alike is not None
    assert unlike is not None
    assert alike.judgement.verdict is Verdict.PASS, alike.judgement
    assert unlike.judgement.verdict is Verdict.INVALID
    assert "lifted text of sglang" in unlike.judgement.reasons[0].message
    assert "install the same release on all nodes" in unlike.judgement.reasons[0].message
