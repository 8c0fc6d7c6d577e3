"""The stand-in for aiter: results, selection and quirks."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from distbench.experts.aiter.emulated import ActivationType, QuantType, quirks
from distbench.experts.aiter.emulated.fused_moe import _as_fp8, fused_moe, get_2stage_cfgs, get_padded_M
from distbench.experts.aiter.emulated.ops.shuffle import shuffle_weight, unshuffled
from distbench.experts.base import ExpertInput, ExpertWeights
from distbench.experts.reference import ReferenceExperts
from distbench.experts.selection.choice import KernelSelector
from distbench.experts.selection.heuristics import LayerKey
from distbench.experts.selection.releases import rules_for

EXPERTS, TOPK, HIDDEN, INTER = 4, 2, 128, 64


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    before = quirks.assumed()
    yield
    quirks.assume(before)


def assume(**values: Any) -> None:
    quirks.assume(quirks.Assumed(**values))


def layer(rows: int, live: int | None = None, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    mask = torch.tensor([0, 1, 1, 0, 1, 1, 0, 0], dtype=torch.int32)
    return {
        "hidden_states": normal(rows, HIDDEN).bfloat16(),
        "w1": (normal(EXPERTS, 2 * INTER, HIDDEN) / 8).bfloat16(),
        "w2": (normal(EXPERTS, HIDDEN, INTER) / 8).bfloat16(),
        "topk_weight": torch.rand(rows, TOPK, generator=generator),
        "topk_ids": torch.randint(0, 8, (rows, TOPK), generator=generator, dtype=torch.int32),
        "expert_mask": mask,
        "num_local_tokens": torch.tensor([rows if live is None else live], dtype=torch.int32),
    }


def call(given: dict[str, Any], **changed: Any) -> torch.Tensor:
    arguments = given | {"w1": shuffle_weight(given["w1"]), "w2": shuffle_weight(given["w2"])}
    return fused_moe(**arguments | {"quant_type": QuantType.No, "activation": ActivationType.Silu} | changed)


def reference(given: dict[str, Any], version: str = quirks.NEWEST) -> torch.Tensor:
    key = LayerKey(num_local_experts=EXPERTS, topk=TOPK, model_dim=HIDDEN, inter_dim=INTER)
    experts = ReferenceExperts(KernelSelector(layer=key, rules=rules_for(version)), 0)
    names = ("hidden_states", "topk_weight", "topk_ids", "num_local_tokens")
    hidden, weights, ids, live = (given[name] for name in names)
    held = ExpertWeights(given["w1"], given["w2"], given["expert_mask"])
    return experts(ExpertInput(hidden, None, weights, ids, live), held)


def same_bits(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.equal(actual.view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize(("rows", "live"), [(1, 1), (7, 5), (64, 40), (300, 300)])
def test_stand_in_gives_the_reference_bits_and_nan_past_the_valid_rows(rows: int, live: int) -> None:
    given = layer(rows, live)
    assert same_bits(call(given)[:live], reference(given)[:live])
    assert bool(call(given)[live:].isnan().all())


@pytest.mark.parametrize(("cu_count", "fp8"), [(304, torch.float8_e4m3fnuz), (256, torch.float8_e4m3fn)])
def test_stand_in_reads_fp8_bytes_in_the_format_of_the_device(cu_count: int, fp8: torch.dtype) -> None:
    assume(cu_count=cu_count)
    made = torch.arange(256, dtype=torch.uint8)
    for said in (torch.float8_e4m3fn, torch.float8_e4m3fnuz):
        assert torch.equal(_as_fp8(made.view(said)).view(torch.uint8), made)
        assert _as_fp8(made.view(said)).dtype is fp8


@pytest.mark.parametrize("element", [torch.bfloat16, torch.float8_e4m3fn])
def test_weight_shuffle_is_invertible(element: torch.dtype) -> None:
    weights = torch.randn(3, 64, 96).to(element)
    shuffled = shuffle_weight(weights)
    assert shuffled.is_shuffled  # type: ignore[attr-defined]
    assert not torch.equal(shuffled.view(torch.uint8), weights.view(torch.uint8))
    assert torch.equal(unshuffled(shuffled).view(torch.uint8), weights.view(torch.uint8))


def test_unshuffled_weights_give_wrong_rows_and_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    given = layer(16)
    garbage = call(given, w1=given["w1"], w2=given["w2"]).clone()
    assert not same_bits(garbage, reference(given))
    assert "not marked as shuffled" in caplog.text


def test_int64_ids_are_misread_as_int32() -> None:
    given = layer(16)
    assert not same_bits(call(given, topk_ids=given["topk_ids"].long()).clone(), reference(given))


@pytest.mark.parametrize(
    "changed", [{"topk_weight": torch.ones(16, TOPK, dtype=torch.bfloat16)}, {"dtype": torch.float32}]
)
def test_stand_in_refuses_what_aiter_refuses(changed: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        call(layer(16), **changed)


def test_num_local_tokens_above_the_tensor_rows_computes_the_tensor_rows_only() -> None:
    given = layer(16, live=24)
    assert same_bits(call(given), reference(layer(16)))


@pytest.mark.parametrize(
    ("version", "buckets"),
    [("0.1.7.post2.dev18", (16, 1024, 1024)), ("0.1.9", (4, 1024, 16384)), ("0.1.20", (4, 2048, 32768))],
)
def test_stand_in_buckets_follow_the_release(version: str, buckets: tuple[int, ...]) -> None:
    assume(version=version)
    assert (get_padded_M(3), get_padded_M(2000), get_padded_M(40_000)) == buckets


def test_kernel_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    assume(cu_count=256)
    caplog.set_level(logging.INFO, logger="aiter")
    for _ in range(2):
        call(layer(40))
    assert [line.split(" for ")[0] for line in caplog.messages] == ["[fused_moe] using 2stage default"]
    assert "(256, 64, 128, 64, 4, 1, 'ActivationType.Silu', 'torch.bfloat16'" in caplog.text


def test_tuned_row_is_logged_with_its_kernel_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = tmp_path / "tuned.csv"
    key = "256,64,128,64,4,1,ActivationType.Silu,torch.bfloat16,torch.bfloat16,torch.bfloat16,QuantType.No,1,0"
    header = "cu_num,token,model_dim,inter_dim,expert,topk,act_type,dtype,q_dtype_a,q_dtype_w,q_type,use_g1u1"
    table.write_text(
        f"{header},doweight_stage1,block_m,ksplit,kernelName1,kernelName2\n{key},32,0,flydsl_a,flydsl_b_reduce\n"
    )
    assume(cu_count=256, table=str(table))
    caplog.set_level(logging.INFO, logger="aiter")
    call(layer(40))
    assert "using 2stage (kernelName1='flydsl_a', kernelName2='flydsl_b_reduce') for" in caplog.text


@pytest.mark.parametrize(
    ("quirk", "rows", "live", "changes"),
    [
        (quirks.WRONG_BUCKET, 3, 3, True),
        (quirks.WRONG_BUCKET, 5, 5, False),
        (quirks.ZERO_ROWS, 64, 4, True),
        (quirks.ZERO_ROWS, 64, 5, False),
        (quirks.UNSET_SPLIT_K, 64, 64, False),
    ],
)
def test_each_quirk_changes_the_documented_rows(quirk: str, rows: int, live: int, *, changes: bool) -> None:
    given = layer(rows, live)
    expected = reference(given)[:live].clone()
    assume(quirks=frozenset({quirk}))
    assert same_bits(call(given)[:live], expected) != changes


FAULTS = f"""
import sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_emulated import assume, call, layer
rows, live, quirk, wild = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4] == "wild"
given = layer(rows, live)
if wild:
    given["topk_ids"][-1] = 0x7FFF0000
assume(quirks=frozenset(filter(None, [quirk])))
call(given)
print("no fault")
"""


@pytest.mark.parametrize(
    ("rows", "live", "quirk", "wild", "complaint"),
    [
        (16, 24, quirks.PAST_ROWS_FAULT, "", "num_local_tokens is 24, the input has 16 rows"),
        (304, 300, quirks.FAULT_AT_ROWS, "", "304 rows"),
        (16, 15, quirks.ALL_ROWS, "wild", "expert id 2147418112"),
        (16, 16, "", "wild", "expert id 2147418112"),
    ],
)
def test_memory_fault_of_the_stand_in_kills_the_process(
    rows: int, live: int, quirk: str, wild: str, complaint: str
) -> None:
    command = [sys.executable, "-c", FAULTS, str(rows), str(live), quirk, wild]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode < 0, done.stderr
    assert complaint in done.stderr


def test_stand_in_does_not_read_ids_past_the_valid_rows() -> None:
    given = layer(16, live=15)
    given["topk_ids"][-1] = -1
    call(given)


def test_selection_function_accepts_keyword_arguments() -> None:
    assume(cu_count=304, version="0.1.20")
    names = ("hidden_pad", "intermediate_pad", "bias1", "bias2")
    metadata = get_2stage_cfgs(
        token=64,
        model_dim=7168,
        inter_dim=2048,
        expert=32,
        topk=8,
        dtype=torch.bfloat16,
        q_dtype_a=torch.bfloat16,
        q_dtype_w=torch.bfloat16,
        q_type=QuantType.No,
        use_g1u1=True,
        activation=ActivationType.Silu,
        doweight_stage1=False,
        **dict.fromkeys(names),
    )
    assert (metadata.block_m, metadata.ksplit, metadata.run_1stage) == (128, 0, False)
