"""Selection of Triton kernels by row count, and tuned tables; no kernel runs here."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distbench.case.presets import PRESETS
from distbench.cli import main
from distbench.errors import InvalidCase, Unsupported
from distbench.experts import make_experts
from distbench.experts.selection.releases import padded_rows
from distbench.experts.triton import adapter, table
from distbench.experts.triton.config import (
    ConfigSelector,
    KernelConfig,
    LayerShape,
    Quant,
    TableRow,
    Tile,
    heuristic,
    routes_per_row,
)
from distbench.experts.triton.table import Table, encode_table, load_table, selector_for, shape_of, shipped_selector
from distbench.launcher.preflight import check_case
from distbench.tools.tune.candidates import families
from distbench.workload.exact import dense_weights
from distbench.workload.exact_plan import plan_exact
from distbench.workload.quantize import quantize_weight_blocks
from tests.cases import tiny_case

DEEPSEEK = LayerShape(num_experts=256, num_local_experts=32, hidden_size=7168, intermediate_size=2048, topk=8)
TILE = Tile(n=128, k=64, stages=3, warps=4)
CONFIG = KernelConfig(block_m=16, gather=True, stage1=TILE, stage2=TILE)
SHIPPED = sorted(Path(table.__file__).with_name("tables").glob("*.json"))
SHARED_BYTES = 227 << 10


def made(**changes: object) -> Table:
    values: dict[str, object] = {
        "device": "NVIDIA H200",
        "num_local_experts": 4,
        "hidden_size": 256,
        "intermediate_size": 128,
        "topk": 4,
        "quant": "bf16",
        "num_experts": 16,
        "versions": {},
        "rows": [TableRow(bucket=64, config=CONFIG, us=1.5)],
    }
    return msgspec.convert(values | changes, Table)


def written(path: Path, table: Table) -> str:
    path.write_bytes(encode_table(table))
    return str(path)


@pytest.mark.parametrize(
    "changed",
    [
        {"block_m": 32},
        {"gather": False},
        {"splits": 2},
        {"mode": "atomic"},
        {"kernel": "cuda"},
        {"stage1": msgspec.structs.replace(TILE, n=64)},
        {"stage1": msgspec.structs.replace(TILE, flatten=True)},
        {"stage2": msgspec.structs.replace(TILE, swap=True)},
        {"stage2": msgspec.structs.replace(TILE, warps=8)},
        {"stage2": msgspec.structs.replace(TILE, stages=4)},
        {"stage2": msgspec.structs.replace(TILE, programs=2)},
    ],
)
def test_configs_that_differ_have_different_kernel_names(changed: dict[str, object]) -> None:
    other = msgspec.structs.replace(CONFIG, **changed)
    assert (other.name1, other.name2) != (CONFIG.name1, CONFIG.name2)


@given(rows=st.integers(1, 200_000))
def test_triton_choice_is_the_tuned_row_of_the_bucket(rows: int) -> None:
    selector = ConfigSelector(shape=DEEPSEEK, tuned=(TableRow(bucket=64, config=CONFIG),), table="some.json")
    choice = selector.choose(rows)
    assert choice.same_kernel(selector.choose(padded_rows(rows)))
    assert (choice.source, choice.table) == (("tuned", "some.json") if 33 <= rows <= 64 else ("heuristic", ""))
    assert choice.stage1 == selector.config(rows).name1


@pytest.mark.parametrize(
    ("num_experts", "local", "topk", "routes"), [(32, 32, 8, 8.0), (256, 32, 8, 1.51), (4, 2, 1, 1.0), (4, 2, 2, 1.2)]
)
def test_expected_routes_per_received_row_follow_experts_and_topk(
    num_experts: int, local: int, topk: int, routes: float
) -> None:
    assert routes_per_row(num_experts, local, topk) == pytest.approx(routes, abs=0.01)


def test_table_tuned_on_other_ranks_is_looked_up_by_the_number_of_routes() -> None:
    rows = tuple(TableRow(bucket=1 << power, config=CONFIG) for power in range(16))
    alone = msgspec.structs.replace(DEEPSEEK, num_experts=32)
    selector = ConfigSelector(shape=alone, tuned=rows, table="t.json", tuned_experts=256)
    read = {asked: selector.choose(asked).table for asked in (1, 512, 1024, 16384, 32768)}
    assert read == {
        1: "t.json, row of 8",
        512: "t.json, row of 4096",
        1024: "t.json, row of 8192",
        16384: "t.json, row of 32768",
        32768: "t.json",
    }
    assert selector.choose(512).bucket == 512
    fewer = ConfigSelector(shape=DEEPSEEK, tuned=rows, table="t.json", tuned_experts=32)
    assert fewer.choose(4096).table == "t.json, row of 1024"
    same = ConfigSelector(shape=DEEPSEEK, tuned=rows, table="t.json", tuned_experts=256)
    assert same.choose(512).table == "t.json"


def test_lookup_uses_the_expert_count_with_which_the_table_was_tuned(tmp_path: Path) -> None:
    rows = [TableRow(bucket=bucket, config=CONFIG) for bucket in (64, 128, 256)]
    path = written(tmp_path / "table.json", made(num_experts=64, rows=rows))
    selector = selector_for(tiny_case(experts="triton", kernel_table=path), "NVIDIA H200")
    assert selector.choose(64).table == f"{path}, row of 128"


@pytest.mark.parametrize("model", PRESETS)
@pytest.mark.parametrize("quant", ["bf16", "fp8"])
def test_heuristic_and_tuning_configs_fit_into_shared_memory(model: str, quant: str) -> None:
    preset, size = PRESETS[model], 1 if quant == "fp8" else 2
    num_experts = preset.experts_for(8)
    shape = LayerShape(
        num_experts=num_experts,
        num_local_experts=num_experts // 8,
        hidden_size=preset.hidden_size,
        intermediate_size=preset.intermediate_size,
        topk=preset.topk,
        quant=msgspec.convert(quant, str),
    )
    for bucket in (1 << power for power in range(16)):
        tried = [config for family in families(shape, bucket) for config in family.configs()]
        assert tried
        for config in [heuristic(shape, bucket), *tried]:
            for tile, matrices in ((config.stage1, 2), (config.stage2, 1)):
                shared = (matrices * tile.n + config.block_m) * tile.k * size * tile.stages
                assert shared * tile.programs <= SHARED_BYTES
                assert quant == "bf16" or (tile.k == 128 and tile.n <= 128)


@pytest.mark.parametrize("model", PRESETS)
@pytest.mark.parametrize("quant", ["bf16", "fp8"])
def test_kernels_in_cuda_are_candidates_for_many_routes_of_layers_that_they_fit(model: str, quant: Quant) -> None:
    preset = PRESETS[model]
    num_experts = preset.experts_for(8)
    shape = LayerShape(
        num_experts=num_experts,
        num_local_experts=num_experts // 8,
        hidden_size=preset.hidden_size,
        intermediate_size=preset.intermediate_size,
        topk=preset.topk,
        quant=quant,
    )
    fits = preset.hidden_size % 256 == 0 and preset.intermediate_size % 128 == 0
    for bucket, many in ((1, False), (32768, True)):
        tried = [family for family in families(shape, bucket, clusters=True) if family.kernel == "cuda"]
        assert [config.kernel for family in tried for config in family.configs()] == ["cuda"] * (fits and many)
    assert all(family.kernel == "triton" for family in families(shape, 32768))
    assert all(family.kernel == "triton" for family in families(shape, 32768, "atomic", clusters=True))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_triton_table_is_complete_and_found(path: Path) -> None:
    known = load_table(path)
    assert known.file_name == path.name
    assert [row.bucket for row in known.rows] == [1 << power for power in range(16)]
    assert all(row.us for row in known.rows)
    shape = LayerShape(
        num_experts=known.num_experts,
        num_local_experts=known.num_local_experts,
        hidden_size=known.hidden_size,
        intermediate_size=known.intermediate_size,
        topk=known.topk,
        quant=known.quant,
    )
    assert shipped_selector(shape, known.device).choose(100).table == path.name
    assert shipped_selector(shape, "NVIDIA L40S").choose(100).source == "heuristic"


NO_BUCKET = msgspec.json.encode(made()).replace(b'"bucket":64', b'"bucket":63')


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[1]",
        b'{"schema": "other"}',
        b"\xff",
        msgspec.json.encode(made()).replace(b'"bucket":64', b'"bucket":63'),
    ],
)
def test_malformed_triton_table_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "table.json"
    path.write_bytes(content)
    with pytest.raises(InvalidCase, match=r"table\.json"):
        load_table(path)


@pytest.mark.parametrize("rows", [[], made().rows, [*made().rows, TableRow(bucket=128, config=CONFIG)]])
def test_triton_table_survives_a_round_trip(tmp_path: Path, rows: list[TableRow]) -> None:
    table = msgspec.structs.replace(made(), rows=rows)
    assert load_table(written(tmp_path / "table.json", table)) == table


def test_kernel_table_of_a_case_is_used(tmp_path: Path) -> None:
    case = tiny_case(experts="triton", kernel_table=written(tmp_path / "table.json", made()))
    assert selector_for(case, "NVIDIA H200").choose(64).table == case.kernel_table
    assert selector_for(case, "NVIDIA H200").choose(65).source == "heuristic"
    assert check_case(case) == ()


def test_triton_table_of_another_layer_is_ignored(tmp_path: Path) -> None:
    case = tiny_case(experts="triton", kernel_table=written(tmp_path / "table.json", made(topk=2)))
    assert selector_for(case, "NVIDIA H200").choose(64).source == "heuristic"
    assert "heuristics" in check_case(case)[0]


def test_triton_experts_are_listed_in_stand_ins() -> None:
    assert "triton for aiter" in tiny_case(experts="triton").stand_ins


def test_triton_experts_without_a_gpu_are_unsupported() -> None:
    pytest.importorskip("triton", reason="Triton is not installed here")
    with patch.object(torch.cuda, "is_available", return_value=False), pytest.raises(Unsupported, match="no GPU"):
        make_experts(tiny_case(experts="triton"))


def test_triton_experts_without_triton_name_the_package_to_install() -> None:
    with patch.dict("sys.modules", {"triton.tools": None}), pytest.raises(Unsupported, match="install triton"):
        adapter.TritonExperts(ConfigSelector(shape=DEEPSEEK))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--buckets", "65"], "65 is no bucket"),
        (["--buckets", "many"], "many"),
        (["--ep-size", "3"], "must divide"),
    ],
)
def test_tune_refuses_invalid_arguments(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["tune", *arguments]) == 2
    assert complaint in capsys.readouterr().err


def test_tune_without_a_gpu_is_unsupported(capsys: pytest.CaptureFixture[str]) -> None:
    with patch.object(torch.cuda, "is_available", return_value=False):
        assert main.main(["tune"]) == 77
    assert "no GPU" in capsys.readouterr().err


def test_exact_weights_are_quantised_to_fp8_without_error() -> None:
    plan = plan_exact(256, 256, 4, "fp8", 4)
    for weights in dense_weights(plan, 0, torch.arange(4)):
        quantized, scales = quantize_weight_blocks(weights, torch.float8_e4m3fn)
        wide = scales.repeat_interleave(128, 1).repeat_interleave(128, 2)
        assert torch.equal(quantized.float() * wide, weights.float())


@given(amax=st.floats(2.0**-90, 2.0**90, width=32))
def test_block_scale_is_the_least_sufficient_power_of_two(amax: float) -> None:
    _, scales = quantize_weight_blocks(torch.full((1, 1, 1), amax), torch.float8_e4m3fn)
    scale = float(scales)
    assert torch.tensor(scale).frexp().mantissa == 0.5
    assert amax / scale <= 448 < 2 * amax / scale


def test_zero_block_has_scale_one() -> None:
    quantized, scales = quantize_weight_blocks(torch.zeros(1, 3, 130), torch.float8_e4m3fn)
    assert scales.tolist() == [[[1.0, 1.0]]]
    assert not quantized.float().any()


def test_triton_shape_is_taken_from_the_case() -> None:
    shape = shape_of(tiny_case(4))
    assert (shape.num_experts, shape.num_local_experts) == (16, 4)
