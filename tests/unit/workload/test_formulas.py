"""Exact inputs of layers with other arithmetic than SiLU(gate) * up: right kernels give their bits, others do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from distbench.errors import InvalidCase
from distbench.workload.batch import TokenBatch
from distbench.workload.exact_plan import plan_exact
from distbench.workload.formula import Formula
from distbench.workload.inputs import Workload
from distbench.workload.quantize import dequantize
from tests.unit.workload.kernels import VARIANTS, Kernel, layer_of, run
from tests.unit.workload.shapes import changed_rows, same_bits, workload_of

GELU, SWIGLU = Formula(activation="gelu"), Formula(activation="swiglu")
FORMULAS = {
    "gelu": GELU,
    "swiglu": SWIGLU,
    "silu limited": Formula(swiglu_limit=10.0),
    "gelu limited": Formula(activation="gelu", swiglu_limit=8.0),
    "bias": Formula(bias=True),
    "gelu, bias": Formula(activation="gelu", bias=True),
    "gpt-oss": Formula(activation="swiglu", bias=True),
    "weights first": Formula(weigh_first=True),
    "gelu, weights first": Formula(activation="gelu", weigh_first=True),
    "gpt-oss, weights first": Formula(activation="swiglu", bias=True, weigh_first=True),
}
RIGHT = (
    "plain",
    "K blocks",
    "split-k",
    "atomic split-k",
    "gates in bf16",
    "gates in fp16",
    "weight on the rounded row",
)


def in_float64(workload: Workload, batch: TokenBatch, formula: Formula) -> Tensor:
    """Layer in float64 by torch's own functions, the intermediate rounded to bf16 and the sum once."""
    wide = dequantize(batch.hidden, batch.scales).double()
    total = torch.zeros_like(wide)
    for expert in range(workload.group.num_experts):
        w1, w2 = (part[0].double() for part in workload.numerics.dense_weights(torch.tensor([expert])))
        share = ((batch.ids == expert) * batch.weights).sum(1, keepdim=True).double()
        first = wide @ w1.t() * (share if formula.weigh_first else 1)
        both = workload.numerics.biases(torch.tensor([expert]))
        first = first if both is None else first + both[0].double()
        gate, up = first.chunk(2, dim=1)
        if formula.activation == "swiglu":
            gate, up = gate.clamp(max=7), up.clamp(-7, 7) + 1
        elif formula.swiglu_limit:
            gate, up = (
                torch.minimum(gate, gate.new_tensor(formula.swiglu_limit)),
                functional.hardtanh(up, -formula.swiglu_limit, formula.swiglu_limit),
            )
        middle = {
            "silu": gate / (1 + torch.exp(-gate)),
            "gelu": gate * (1 + torch.erf(gate / 2**0.5)) / 2,
            "swiglu": gate * torch.sigmoid(1.702 * gate),
        }[formula.activation]
        result = (middle * up).bfloat16().double() @ w2.t()
        result = result if both is None else result + both[1].double()
        total += result * ((share > 0) if formula.weigh_first else share)
    return (total + 0.0).bfloat16()


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("shape", ["gpt-oss-120b/15", "tiny"])
def test_oracle_of_a_formula_equals_torch_in_float64_and_every_right_kernel(name: str, shape: str) -> None:
    workload = workload_of(shape, 3, tokens=16, formula=FORMULAS[name])
    batch = workload.tokens(0)
    expected = workload.expected(batch)
    assert expected is not None
    assert same_bits(expected, in_float64(workload, batch, FORMULAS[name]))
    local, rows = layer_of(workload, range(1, 2)), workload.expected_rows(1, batch)
    assert rows is not None
    for variant in RIGHT:
        assert changed_rows(rows, run(VARIANTS[variant], local, batch)) == [], variant


IN_FP8 = {
    "gelu": GELU,
    "bias": Formula(bias=True),
    "gelu, bias": Formula(activation="gelu", bias=True),
    "weights first": Formula(weigh_first=True),
}


@pytest.mark.parametrize(("shape", "intermediate"), [("tiny fp8", "e4m3"), ("tiny fnuz", "e4m3"), ("tiny fp8", "bf16")])
@pytest.mark.parametrize("combine", ["none", "fp8_blockwise"])
@pytest.mark.parametrize("name", IN_FP8)
def test_formula_without_a_limit_is_exact_in_fp8_as_well(
    name: str, shape: str, intermediate: str, combine: str
) -> None:
    formula = IN_FP8[name]
    workload = workload_of(shape, 4, tokens=16, formula=formula, intermediate=intermediate, combine_quant=combine)
    batch = workload.tokens(0)
    local, rows = layer_of(workload, range(1, 2)), workload.expected_rows(1, batch)
    assert rows is not None
    for variant in ("plain", "split-k", "one stage", "scales by powers of two"):
        assert changed_rows(rows, run(VARIANTS[variant], local, batch)) == [], variant
    if formula.activation == "gelu":
        assert changed_rows(rows, run(Kernel(), local._replace(formula=Formula()), batch)), "silu for gelu"


WRONG = {
    "gelu": {"silu for gelu": Formula(), "an unknown limit": Formula(activation="gelu", swiglu_limit=7.0)},
    "swiglu": {
        "silu for swiglu": Formula(),
        "gelu for swiglu": GELU,
        "no limit": Formula(activation="swiglu", swiglu_limit=1e4),
        "a limit of 8": Formula(activation="swiglu", swiglu_limit=8.0),
    },
    "silu limited": {"no limit": Formula(), "a limit of 7": Formula(swiglu_limit=7.0), "swiglu": SWIGLU},
    "gelu limited": {"no limit": GELU, "silu for gelu": Formula(swiglu_limit=8.0)},
}


@pytest.mark.parametrize("shape", ["gpt-oss-120b/15", "tiny"])
@pytest.mark.parametrize("name", WRONG)
def test_another_formula_changes_expert_rows(name: str, shape: str) -> None:
    workload = workload_of(shape, 5, tokens=16, formula=FORMULAS[name])
    batch = workload.tokens(0)
    local, rows = layer_of(workload, range(1, 2)), workload.expected_rows(1, batch)
    assert rows is not None
    for wrong, formula in WRONG[name].items():
        assert changed_rows(rows, run(Kernel(), local._replace(formula=formula), batch)), wrong


def other_bias(biases: tuple[Tensor, Tensor], name: str) -> tuple[Tensor, Tensor]:
    first, second = biases
    half = first.shape[1] // 2
    gate, up = first[:, :half], first[:, half:]
    return {
        "no bias of the gate": (torch.cat([gate * 0, up], dim=1), second),
        "no bias of up": (torch.cat([gate, up * 0], dim=1), second),
        "no bias of the output": (first, second * 0),
        "another expert's first": (first.roll(1, 0), second),
        "another expert's second": (first, second.roll(1, 0)),
        "first twice": (first * 2, second),
        "second twice": (first, second * 2),
        "wrong sign of the first": (-first, second),
        "wrong sign of the second": (first, -second),
        "gate's and up's exchanged": (torch.cat([up, gate], dim=1), second),
        "first moved by a column": (first.roll(1, 1), second),
        "second moved by a column": (first, second.roll(1, 1)),
    }[name]


BIASES = (
    *("no bias of the gate", "no bias of up", "no bias of the output", "another expert's first"),
    *("another expert's second", "first twice", "second twice", "wrong sign of the first", "wrong sign of the second"),
    *("gate's and up's exchanged", "first moved by a column", "second moved by a column"),
)


@pytest.mark.parametrize("shape", ["gpt-oss-120b/15", "tiny fp8"])
@pytest.mark.parametrize("fault", BIASES)
def test_a_wrong_bias_changes_every_expert_row(shape: str, fault: str) -> None:
    formula = Formula(bias=True) if shape.endswith("fp8") else FORMULAS["gpt-oss"]
    workload = workload_of(shape, 5, tokens=16, formula=formula)
    batch = workload.tokens(0)
    local, rows = layer_of(workload, range(1, 2)), workload.expected_rows(1, batch)
    assert rows is not None
    assert local.biases is not None
    visited = int(((batch.ids >= 4) & (batch.ids < 8)).any(1).sum())
    wrong = local._replace(biases=other_bias(local.biases, fault))
    assert len(changed_rows(rows, run(Kernel(), wrong, batch))) == visited


@pytest.mark.parametrize("name", ["weights first", "gelu, weights first"])
@pytest.mark.parametrize("twice", [False, True])
def test_weights_in_the_other_stage_or_in_both_change_expert_rows(name: str, twice: bool) -> None:
    workload = workload_of("qwen3-30b-a3b/8", 6, tokens=16, formula=FORMULAS[name])
    batch = workload.tokens(0)
    local, rows = layer_of(workload, range(1, 2)), workload.expected_rows(1, batch)
    assert rows is not None
    formula = FORMULAS[name] if twice else Formula(activation=FORMULAS[name].activation)
    weights = batch.weights.square() if twice else batch.weights
    assert changed_rows(rows, run(Kernel(), local._replace(formula=formula), batch._replace(weights=weights)))


@pytest.mark.parametrize(
    ("formula", "dtype", "reason"),
    [
        (SWIGLU, "fp8", "no powers of two"),
        (Formula(swiglu_limit=10.0), "fp8", "no powers of two"),
        (Formula(activation="swiglu", swiglu_limit=6.0), "bf16", "at least 7"),
        (Formula(swiglu_limit=7.0), "bf16", "at least 8"),
        (Formula(activation="swiglu", swiglu_limit=9.0), "bf16", "rounding boundary"),
    ],
)
def test_formula_that_cannot_be_exact_is_refused_with_the_reason(formula: Formula, dtype: str, reason: str) -> None:
    with pytest.raises(InvalidCase, match=f"{reason}.*numerics = gaussian"):
        plan_exact(256, 128, 4, "fp8" if dtype == "fp8" else "bf16", 8, formula=formula)
