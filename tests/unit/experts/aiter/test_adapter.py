"""The adapter of aiter, over its stand-in: arguments, weights, and its report of kernels."""

from __future__ import annotations

import hashlib
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import msgspec
import pytest
import torch

from distbench.case.spec import Case
from distbench.errors import DistbenchError, InvalidCase, Unsupported, Verdict
from distbench.experts import make_experts, make_selector
from distbench.experts.aiter.adapter import AiterExperts, make_aiter_experts
from distbench.experts.aiter.arguments import check_arguments, check_ids, check_live
from distbench.experts.aiter.emulated import quirks
from distbench.experts.aiter.log import KernelLog
from distbench.experts.aiter.package import STAND_IN, check_available, check_settings, followed_release, load_package
from distbench.experts.base import ExpertInput, ExpertWeights
from distbench.experts.selection.tuned_table import KEY_COLUMNS, TunedKey
from distbench.launcher.preflight import check_case
from distbench.pipeline.graphs import GraphedExperts
from distbench.report.document import kernel_doubts
from distbench.workload.quantize import quantize_weight_blocks
from tests.cases import tiny_case
from tests.host_reads import HostReads

ROWS = 16
FP8 = [torch.float8_e4m3fn, torch.float8_e4m3fnuz]


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    before = quirks.assumed()
    yield
    quirks.assume(before)


def aiter_case(**values: Any) -> Case:
    return tiny_case(4, **{"experts": "aiter", "emulate": True} | values)


def given(rows: int = ROWS, **changed: Any) -> dict[str, Any]:
    arguments = {
        "hidden": torch.zeros(rows, 256, dtype=torch.bfloat16),
        "weights": torch.zeros(rows, 4),
        "ids": torch.zeros(rows, 4, dtype=torch.int32),
        "mask": torch.ones(16, dtype=torch.int32),
        "scale": None,
        "weight_scale": None,
    }
    return arguments | changed


def test_valid_arguments_pass_the_check() -> None:
    check_arguments(**given())
    float8 = torch.zeros(ROWS, 256, dtype=torch.float8_e4m3fn)
    check_arguments(**given(hidden=float8, scale=torch.ones(ROWS, 2), weight_scale=torch.ones(4, 2, 2)))


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"ids": torch.zeros(ROWS, 4, dtype=torch.int64)}, "topk_ids is torch.int64: torch.int32"),
        ({"weights": torch.zeros(ROWS, 4, dtype=torch.bfloat16)}, "topk_weight is torch.bfloat16"),
        ({"mask": torch.ones(16, dtype=torch.bool)}, "expert_mask is torch.bool"),
        ({"ids": torch.zeros(4, ROWS, dtype=torch.int32).t()}, "topk_ids is not contiguous"),
        ({"ids": torch.zeros(ROWS - 1, 4, dtype=torch.int32)}, "topk_ids has 15 rows, hidden_states 16"),
        ({"weights": torch.zeros(ROWS - 1, 4)}, "topk_weight has 15 rows"),
        ({"hidden": torch.zeros(ROWS, 256, dtype=torch.float8_e4m3fn)}, "float8 goes with a1_scale"),
        ({"scale": torch.ones(ROWS, 2)}, "bf16 with neither"),
        (
            {
                "hidden": torch.zeros(ROWS, 256, dtype=torch.float8_e4m3fn),
                "scale": torch.ones(ROWS - 1, 2),
                "weight_scale": torch.ones(1),
            },
            r"a1_scale is \[15, 2\]: \[16, 2\]",
        ),
    ],
)
def test_invalid_arguments_are_refused(changed: dict[str, Any], complaint: str) -> None:
    with pytest.raises(DistbenchError, match=complaint) as caught:
        check_arguments(**given(**changed))
    assert caught.value.verdict is Verdict.RANK_FAULT  # the rank's peers are in the middle of a pass


@pytest.mark.parametrize("wild", [-1, 16, 0x7FFF0000])
def test_expert_id_out_of_range_in_a_valid_row_is_refused(wild: int) -> None:
    check_ids(torch.tensor([[0, 15]], dtype=torch.int32), 16)
    with pytest.raises(DistbenchError, match=f"topk_ids holds {wild} in a valid row: allowed is 0 to 15"):
        check_ids(torch.tensor([[0, wild]], dtype=torch.int32), 16)


def test_num_local_tokens_above_the_rows_is_refused() -> None:
    check_live(16, 16)
    with pytest.raises(DistbenchError, match="num_local_tokens = 17: at most 16"):
        check_live(17, 16)


def quiet_experts(case: Case) -> tuple[AiterExperts, list[int]]:
    """Adapter over kernels that neither compute nor read, and the row counts of their calls."""
    package = load_package(STAND_IN)
    calls: list[int] = []

    def fused_moe(hidden_states: torch.Tensor, **_: object) -> torch.Tensor:
        calls.append(hidden_states.shape[0])
        return hidden_states

    moe = SimpleNamespace(**vars(package.moe) | {"fused_moe": fused_moe})
    return AiterExperts(case, package._replace(moe=moe)), calls


def passed(rows: int, live: int, last: int) -> ExpertInput:
    ids = torch.zeros(rows, 4, dtype=torch.int32)
    ids[rows - 1] = last
    hidden, weights = torch.zeros(rows, 256).bfloat16(), torch.zeros(rows, 4)
    return ExpertInput(hidden, None, weights, ids, torch.tensor([live], dtype=torch.int32))


def held() -> ExpertWeights:
    w1, w2 = torch.zeros(4, 256, 256).bfloat16(), torch.zeros(4, 256, 128).bfloat16()
    return ExpertWeights(w1, w2, torch.ones(16, dtype=torch.int32))


def test_call_after_the_first_makes_no_host_synchronisation() -> None:
    experts, calls = quiet_experts(aiter_case())
    given, weights = passed(rows=8, live=9, last=99), held()
    experts(given, weights)
    with HostReads() as reads:
        experts(given, weights)
    assert (reads.count, calls) == (0, [8, 8])


def test_ids_and_row_count_are_checked_unless_the_policy_is_unchecked() -> None:
    strict, unchecked = (quiet_experts(aiter_case(policy=policy))[0] for policy in ("strict", "unchecked"))
    wild, many, weights = passed(8, 8, 99), passed(8, 9, 0), held()
    for experts in (strict, GraphedExperts(strict)):
        experts.check(passed(8, 7, 99), weights)
        with pytest.raises(DistbenchError, match="topk_ids holds 99 in a valid row"):
            experts.check(wild, weights)
        with pytest.raises(DistbenchError, match="num_local_tokens = 9: at most 8"):
            experts.check(many, weights)
    unchecked.check(many, weights)


@pytest.mark.parametrize("fp8", FP8)
def test_weights_representable_in_fp8_are_quantised_exactly(fp8: torch.dtype) -> None:
    weights = torch.randint(-7, 8, (2, 256, 384)).bfloat16() * torch.exp2(torch.arange(3).repeat_interleave(128))
    narrow, scale = quantize_weight_blocks(weights, fp8)
    assert scale.shape == (2, 2, 3)
    wide = narrow.float().view(2, 2, 128, 3, 128) * scale.view(2, 2, 1, 3, 1)
    assert torch.equal(wide.view(2, 256, 384), weights.float())


@pytest.mark.parametrize("fp8", FP8)
def test_quantised_weight_blocks_use_the_whole_fp8_range(fp8: torch.dtype) -> None:
    narrow, _ = quantize_weight_blocks(torch.randn(2, 256, 256).bfloat16(), fp8)
    largest = narrow.float().abs().view(2, 2, 128, 2, 128).amax((2, 4))
    assert bool((largest > 0.46 * torch.finfo(fp8).max).all())


def test_weights_passed_to_aiter_are_marked_as_shuffled() -> None:
    experts = make_aiter_experts(aiter_case())
    prepared = experts.prepared(held())
    assert prepared.w1.is_shuffled  # type: ignore[attr-defined]
    assert prepared.w2.is_shuffled  # type: ignore[attr-defined]


@pytest.mark.parametrize("version", ["", "0.1.7.post2.dev18", "0.1.9"])
@pytest.mark.parametrize(("quant", "cu_count"), [("bf16", 304), ("bf16", 256), ("fp8", 256), ("fp8", 304)])
def test_choice_read_from_the_package_equals_the_selectors(version: str, quant: str, cu_count: int) -> None:
    case = aiter_case(aiter_version=version, dispatch_dtype=quant, cu_count=cu_count)
    experts, selector = make_experts(case), make_selector(case)
    for rows in (0, 1, 3, 16, 17, 64, 200, 1000, 1025, 40_000):
        expected = selector.choose(rows)
        assert experts.selection(rows) == msgspec.structs.replace(expected, bucket=selector.choose(rows).bucket)


def test_kernel_in_the_log_that_differs_from_the_choice_raises_a_doubt() -> None:
    case = aiter_case(cu_count=256)
    choice, layer = make_selector(case).choose(64), make_selector(case).layer
    log = KernelLog()
    assert not log.doubt(choice, layer)
    _say(log, "[fused_moe] using 2stage default for ('gfx950', 256, 64, 256, 128, 4, 4, 'ActivationType.Silu') ")
    assert not log.doubt(choice, layer)
    other = KernelLog()
    _say(other, "[fused_moe] using 2stage (kernelName1='a', kernelName2='b') for (256, 64, 256, 128, 4, 4, 'x') ")
    assert re.match(r"aiter logged .*kernelName1='a'.*, but selects H bm32", other.doubt(choice, layer))
    assert log.of_layer(layer)
    assert not log.of_layer(msgspec.structs.replace(layer, model_dim=7168))


def one_stage_table(case: Case, folder: Path) -> str:
    """Write a table with a one-stage row of bucket 64; its second kernel cell is as in aiter's own tables."""
    key = msgspec.to_builtins(TunedKey.for_layer(make_selector(case).layer))
    row = {name: key[name] for name in KEY_COLUMNS if name != "token"}
    row |= {"token": 64, "act_type": "ActivationType.Silu", "block_m": 32, "ksplit": 0, "run_1stage": 1}
    row |= {"kernelName1": "one_stage_kernel", "kernelName2": "Null"}
    row |= {name: int(row[name]) for name in ("use_g1u1", "doweight_stage1")}
    path = folder / "tuned_fmoe.csv"
    path.write_text(",".join(row) + "\n" + ",".join(map(str, row.values())) + "\n")
    return str(path)


def test_one_stage_choice_is_compared_by_its_first_kernel_only(tmp_path: Path) -> None:
    case = aiter_case(dispatch_dtype="fp8", cu_count=256)
    experts = make_aiter_experts(msgspec.structs.replace(case, kernel_table=one_stage_table(case, tmp_path)))
    choice = experts.selection(64)
    assert (choice.source, choice.run_1stage, choice.stage1, choice.stage2) == ("tuned", True, "one_stage_kernel", "")
    about = experts.about()["aiter"]
    assert any("kernelName1='one_stage_kernel', kernelName2='Null'" in line for line in about["log"])
    assert about["doubts"] == []


def test_selection_that_the_log_contradicts_gives_a_warning() -> None:
    experts = make_aiter_experts(aiter_case(cu_count=256))
    with patch.object(KernelLog, "doubt", lambda *_: "other kernels"):
        experts.selection(64)
        experts.selection(64)
    assert experts.about()["aiter"]["doubts"] == ["other kernels"]
    records: Any = [SimpleNamespace(rank=3, packages=experts.about()), SimpleNamespace(rank=4, packages={})]
    assert kernel_doubts(records) == ["rank 3: other kernels"]


def _say(log: KernelLog, line: str) -> None:
    log.emit(logging.LogRecord("aiter", logging.INFO, "", 0, line, None, None))


def test_selection_function_with_an_unknown_argument_is_unsupported() -> None:
    def get_2stage_cfgs(token: int, colour: str) -> None:
        raise AssertionError(token, colour)

    package = load_package(STAND_IN)

    class Newer:
        get_padded_M = staticmethod(package.moe.get_padded_M)  # noqa: N815

    Newer.get_2stage_cfgs = staticmethod(get_2stage_cfgs)  # type: ignore[attr-defined]
    experts = AiterExperts(aiter_case(), package._replace(moe=Newer))
    with pytest.raises(Unsupported, match="asks for colour"):
        experts.selection(16)


def test_facts_hold_version_device_table_and_log() -> None:
    experts = make_aiter_experts(aiter_case(cu_count=256, aiter_version="0.1.9"))
    experts.selection(64)
    about = experts.about()["aiter"]
    assert (about["version"], about["gfx"], about["cu_count"]) == ("0.1.9", "gfx950", 256)
    assert about["tuned_tables"] == {"sources": [], "read": []}
    assert about["log"]


def test_facts_hold_digest_and_rows_of_each_table_at_the_time_of_reading(tmp_path: Path) -> None:
    table = tmp_path / "tuned.csv"
    content = Path("tests/data/atomic.csv").read_bytes()
    table.write_bytes(content)
    experts = make_aiter_experts(aiter_case(kernel_table=str(table)))
    told = {"path": str(table), "sha256": hashlib.sha256(content).hexdigest(), "rows": content.count(b"\n") - 1}
    table.write_bytes(b"")
    assert experts.about()["aiter"]["tuned_tables"] == {"sources": [told], "read": [told]}


@pytest.mark.parametrize(
    ("values", "error", "complaint"),
    [
        ({"hidden_size": 144}, InvalidCase, "hidden_size = 144: aiter takes bf16 weights in multiples of 64; use 192"),
        ({"model": "tiny-odd"}, InvalidCase, "intermediate_size = 96: aiter takes bf16 weights in multiples of 64"),
        ({"intermediate_size": 48}, InvalidCase, "intermediate_size = 48: .*use 64"),
        ({"dispatch_dtype": "fp8", "intermediate_size": 96, "cu_count": 256}, InvalidCase, "in multiples of 128"),
        ({"dispatch_dtype": "fp8", "fp8_format": "e4m3fn"}, Unsupported, "aiter's kernels for gfx942 read e4m3fnuz"),
    ],
)
def test_case_that_aiter_cannot_run_is_refused(
    values: dict[str, Any], error: type[DistbenchError], complaint: str
) -> None:
    with pytest.raises(error, match=complaint):
        make_experts(aiter_case(**values))


def warmed(case: Case, rows: int, experts: AiterExperts | None = None) -> None:
    shapes = ((2 * case.intermediate_size, case.hidden_size), (case.hidden_size, case.intermediate_size))
    w1, w2 = (torch.zeros(case.experts_per_rank, *shape).bfloat16() for shape in shapes)
    made = make_aiter_experts(case) if experts is None else experts
    made.warm_up(ExpertWeights(w1, w2, torch.ones(case.num_experts, dtype=torch.int32)), (rows,))


ODD_TILES = {"hidden_size": 320, "intermediate_size": 320, "cu_count": 80}


def test_row_count_whose_kernel_does_not_fit_the_layer_is_refused_in_warm_up() -> None:
    case = aiter_case(**ODD_TILES)
    warmed(case, 16)
    with pytest.raises(
        Unsupported,
        match=r"for 256 rows .*: stage 1, ck_2stages_gemm1_bm64_n128_\w+, "
        r"needs multiples of 128 columns and of \d+ in K, the layer has 320",
    ):
        warmed(case, 256)


def test_error_of_the_package_in_warm_up_is_unsupported_if_kernels_are_unknown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    case = aiter_case(**ODD_TILES)
    package = load_package(STAND_IN)
    experts = make_aiter_experts(case)
    monkeypatch.setattr(package.core, "get_user_jit_dir", lambda: str(tmp_path))
    unknown = experts.selection(256)
    monkeypatch.setattr(experts, "_choices", {256: msgspec.structs.replace(unknown, stage1="a", stage2="b")})
    with pytest.raises(Unsupported, match=r"for 256 rows .*wrong! device_gemm .*use sizes that are multiples of 128"):
        warmed(case, 256, experts)


def test_missing_package_is_unsupported_without_emulate() -> None:
    assert "aiter" not in sys.modules
    with pytest.raises(Unsupported, match=r"amd-aiter is not installed; .*docs/amd.md"):
        check_case(aiter_case(emulate=False))
    with pytest.raises(Unsupported, match="cannot be imported"):
        make_experts(aiter_case(emulate=False))


def test_unknown_aiter_habit_is_refused_before_a_rank_starts() -> None:
    with pytest.raises(InvalidCase, match="'speed' is no quirk"):
        check_available(aiter_case(aiter_habits="zero-rows,speed"))
    with pytest.raises(InvalidCase, match="apply to the stand-in only"):
        check_available(aiter_case(aiter_habits="zero-rows", emulate=False))


def test_real_package_with_another_release_or_table_than_the_case_is_refused(tmp_path: Any) -> None:
    table = tmp_path / "table.csv"
    table.write_text("")
    case, package = aiter_case(emulate=False, aiter_version="0.1.9"), load_package(STAND_IN)
    assert followed_release(case, package._replace(version="0.1.9")) == "0.1.9"
    with pytest.raises(InvalidCase, match=r"0\.1\.20 is installed"):
        followed_release(case, package._replace(version="0.1.20"))
    tabled = aiter_case(emulate=False, kernel_table=str(table))
    check_settings(tabled, {"AITER_CONFIG_FMOE": str(table)})
    with pytest.raises(InvalidCase, match="set AITER_CONFIG_FMOE="):
        check_settings(tabled, {})


@pytest.mark.parametrize("version", ["0.1.dev1+g123", "unknown"])
def test_build_without_a_version_tag_needs_aiter_version(version: str) -> None:
    package = load_package(STAND_IN)._replace(version=version)
    with pytest.raises(InvalidCase, match="aiter_version"):
        AiterExperts(aiter_case(emulate=False), package)
    with pytest.raises(InvalidCase, match=rf"the installed {re.escape(version)} has bucket 1 for 1 rows, .* 16; give"):
        AiterExperts(aiter_case(emulate=False, aiter_version="0.1.5"), package)
    about = AiterExperts(aiter_case(emulate=False, aiter_version="0.1.19"), package).about()["aiter"]
    assert (about["version"], about["rules"]) == (version, "0.1.19")


def test_real_package_on_the_cpu_is_refused() -> None:
    experts = AiterExperts(aiter_case(emulate=False), load_package(STAND_IN))
    with pytest.raises(Unsupported, match="--device cuda"):
        experts.warm_up(held(), (16,))


def test_emulated_aiter_is_listed_in_stand_ins() -> None:
    assert aiter_case().stand_ins == ["collective for mori", "distbench.experts.aiter.emulated for aiter"]
    assert "distbench.experts.aiter.emulated for aiter" not in aiter_case(emulate=False).stand_ins
