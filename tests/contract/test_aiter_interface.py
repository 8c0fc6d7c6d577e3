"""Names and signatures by which the adapter and the stand-in call aiter match the released wheel; read with `ast`.

The wheel is never imported. Its torch code is run: `torch_moe` against our experts, `shuffle_weight` against the
stand-in's.
"""

from __future__ import annotations

import ast
import inspect
import re
import zipfile
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from distbench.case.spec import Case
from distbench.experts.aiter import emulated as stand_in
from distbench.experts.aiter.adapter import make_aiter_experts
from distbench.experts.aiter.emulated import fused_moe as stand_in_moe
from distbench.experts.aiter.emulated import quirks
from distbench.experts.aiter.emulated.jit import core as stand_in_core
from distbench.experts.aiter.emulated.jit.utils import chip_info
from distbench.experts.aiter.emulated.ops import shuffle
from distbench.experts.aiter.emulated.utility import dtypes
from distbench.experts.aiter.package import DISTRIBUTION
from distbench.experts.base import ExpertInput, ExpertWeights
from distbench.pipeline.inputs import workload_for
from distbench.utils.amd_arch import fp8_format
from tests.cases import tiny_case
from tests.contract.wheels import aiter_wheel, function, lifted, tree

VERSION = "0.1.7.post2.dev18"
MODULES: dict[str, tuple[ModuleType, tuple[str, ...]]] = {
    "aiter/fused_moe.py": (stand_in_moe, ("fused_moe", "get_2stage_cfgs", "get_padded_M", "get_block_size_M")),
    "aiter/ops/shuffle.py": (shuffle, ("shuffle_weight",)),
    "aiter/jit/core.py": (stand_in_core, ("get_user_jit_dir",)),
    "aiter/jit/utils/chip_info.py": (chip_info, ("get_gfx", "get_cu_num")),
    "aiter/utility/dtypes.py": (dtypes, ("get_dtype_fp8",)),
}


@pytest.fixture(scope="module")
def wheel() -> Iterator[zipfile.ZipFile]:
    with aiter_wheel(VERSION) as archive:
        yield archive


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    before = quirks.assumed()
    yield
    quirks.assume(before)


def parameters(node: ast.FunctionDef) -> dict[str, str | None]:
    """Default of each parameter as text, None if it has none."""
    names = [argument.arg for argument in node.args.args]
    required = len(names) - len(node.args.defaults)
    defaults = [None] * required + [ast.unparse(default) for default in node.args.defaults]
    return dict(zip(names, defaults, strict=True))


@pytest.mark.parametrize("path", MODULES)
def test_stand_in_functions_have_the_wheels_parameters_and_defaults(wheel: zipfile.ZipFile, path: str) -> None:
    module, names = MODULES[path]
    for name in names:
        theirs = parameters(function(tree(wheel, path), name))
        ours = inspect.signature(getattr(module, name)).parameters
        assert list(ours)[: len(theirs)] == list(theirs), name
        extra = [one for one in list(ours)[len(theirs) :] if ours[one].default is inspect.Parameter.empty]
        assert not extra, "parameters of later releases are optional"
        for parameter, default in theirs.items():
            found = ours[parameter].default
            assert (found is inspect.Parameter.empty) == (default is None), (name, parameter)
            assert default is None or str(found) == default, (name, parameter)


def test_arguments_that_the_adapter_passes_are_parameters_of_the_wheel(wheel: zipfile.ZipFile) -> None:
    theirs = parameters(function(tree(wheel, "aiter/fused_moe.py"), "fused_moe"))
    experts = make_aiter_experts(tiny_case(4, experts="aiter", emulate=True))
    rows, weights = torch.zeros(8, 256).bfloat16(), torch.zeros(8, 4)
    given = ExpertInput(rows, None, weights, weights.int(), torch.zeros(1, dtype=torch.int32))
    w1, w2 = (torch.zeros(4, 256, 128).bfloat16() for _ in range(2))
    held = ExpertWeights(w1, w2, torch.zeros(32, dtype=torch.int32))
    passed = set(experts.arguments(given, held))
    assert passed <= set(theirs)
    assert {name for name, default in theirs.items() if default is None} <= passed


def test_selection_arguments_of_the_adapter_cover_the_wheels_parameters(wheel: zipfile.ZipFile) -> None:
    moe = tree(wheel, "aiter/fused_moe.py")
    theirs = parameters(function(moe, "get_2stage_cfgs"))
    experts = make_aiter_experts(tiny_case(4, experts="aiter", emulate=True))
    asked = experts._selection_arguments(64)  # noqa: SLF001
    assert set(theirs) <= set(asked)
    call = next(
        node
        for node in ast.walk(function(moe, "fused_moe_"))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "get_2stage_cfgs"
    )
    assert len(call.args) == len(theirs)


def test_stand_in_moe_metadata_has_the_wheels_fields(wheel: zipfile.ZipFile) -> None:
    moe = tree(wheel, "aiter/fused_moe.py")
    theirs = next(node for node in moe.body if isinstance(node, ast.ClassDef) and node.name == "MOEMetadata")
    fields = [
        node.target.id for node in theirs.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    ]
    assert list(stand_in_moe.MOEMetadata.__dataclass_fields__) == fields


def test_log_line_that_the_adapter_parses_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    text = wheel.read("aiter/fused_moe.py").decode()
    assert (
        "[fused_moe] using {'1stage' if run_1stage else '2stage'} {'default' if cfg is None else tag} for {keys} "
        in text
    )
    assert 'tag = f"({kernelName1=}, {kernelName2=})"' in text
    assert 'logger = logging.getLogger("aiter")' in wheel.read("aiter/__init__.py").decode()


def test_module_attributes_that_the_adapter_reads_exist_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    assert "AITER_CONFIG_FMOE_FILE = get_config_file(" in wheel.read("aiter/jit/core.py").decode()
    root = wheel.read("aiter/__init__.py").decode()
    assert "from .ops.enum import *" in root
    assert "from .utility import dtypes as dtypes" in root
    metadata = wheel.read(f"amd_aiter-{VERSION}.dist-info/METADATA").decode()
    assert f"Name: {DISTRIBUTION}\n" in metadata
    assert f"Version: {VERSION}\n" in metadata


def test_stand_in_enums_have_the_wheels_values(wheel: zipfile.ZipFile) -> None:
    text = wheel.read("aiter_meta/csrc/include/aiter_enum.h").decode()
    for enum in (stand_in.ActivationType, stand_in.QuantType):
        body = text.split(f"enum class {enum.__name__}")[1].split("{")[1].split("}")[0]
        names, number = {}, -1
        for line in (part.strip() for part in body.split("//")[0].replace("\n", " ").split(",")):
            name, _, value = (word.strip() for word in line.partition("="))
            number = int(value) if value else number + 1
            if name:
                names[name] = number
        assert {member.name: member.value for member in enum}.items() <= names.items()


def test_fp8_format_of_each_architecture_equals_the_wheels(wheel: zipfile.ZipFile) -> None:
    text = wheel.read("aiter/utility/dtypes.py").decode()
    theirs = dict(re.findall(r'"(gfx\w+)": \{"fp8": torch\.float8_(\w+)\}', text))
    assert theirs == {arch: fp8_format(arch) for arch in ("gfx942", "gfx950")}
    assert "dtypeMax = torch.finfo(dtype).max" in wheel.read("aiter/ops/quant.py").decode()


def test_stand_in_weight_shuffle_equals_the_wheels(wheel: zipfile.ZipFile) -> None:
    theirs = lifted(wheel, "aiter/ops/shuffle.py", ("shuffle_weight",), {})["shuffle_weight"]
    for element in (torch.bfloat16, torch.float8_e4m3fn):
        weights = torch.randn(3, 64, 96).to(element)
        ours, expected = shuffle.shuffle_weight(weights), theirs(weights)
        assert torch.equal(ours.view(torch.uint8), expected.view(torch.uint8))
        assert ours.is_shuffled == expected.is_shuffled  # type: ignore[attr-defined]
    for shape in ((1, 24, 64), (1, 32, 48)):
        with pytest.raises(AssertionError):
            theirs(torch.zeros(shape))
        with pytest.raises(AssertionError):
            shuffle.shuffle_weight(torch.zeros(shape))


@pytest.fixture(scope="module")
def torch_moe(wheel: zipfile.ZipFile) -> Any:
    functions = {"get_torch_act": lambda _: torch.nn.functional.silu}
    namespace: dict[str, Any] = {
        "aiter": SimpleNamespace(**functions),
        "dtypes": SimpleNamespace(fp32=torch.float32, i32=torch.int32),
        "ActivationType": SimpleNamespace(Silu=0),
    }
    return lifted(wheel, "aiter/fused_moe.py", ("torch_moe_act", "torch_moe"), namespace)["torch_moe"]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("case", [{"rows": 1}, {"rows": 40}, {"rows": 300}])
def test_bf16_results_equal_those_of_the_wheels_torch_code(torch_moe: Any, seed: int, case: dict[str, int]) -> None:
    rows = case["rows"]
    generator = torch.Generator().manual_seed(seed)
    experts = make_aiter_experts(layer_case())
    hidden = torch.randn(rows, 256, generator=generator).bfloat16()
    w1 = (torch.randn(4, 256, 256, generator=generator) / 16).bfloat16()
    w2 = (torch.randn(4, 256, 128, generator=generator) / 11).bfloat16()
    weights = torch.rand(rows, 4, generator=generator)
    ids = torch.rand(rows, 16, generator=generator).argsort(1)[:, :4].int().contiguous()
    mask = torch.zeros(16, dtype=torch.int32)
    mask[torch.randperm(16, generator=generator)[:4]] = 1
    live = torch.tensor([rows], dtype=torch.int32)
    ours = experts(ExpertInput(hidden, None, weights, ids, live), ExpertWeights(w1, w2, mask))
    theirs = torch_moe(hidden, w1, w2, weights, ids, expert_mask=mask).float()
    # Ours rounds the activation, each route and each add to bf16; theirs only the sum.
    assert float((ours.float() - theirs).abs().max()) <= 2.0**-6 * float(theirs.abs().max())


def layer_case() -> Case:
    return tiny_case(4, experts="aiter", emulate=True)


def test_exact_inputs_give_the_bits_of_the_wheels_torch_code(torch_moe: Any) -> None:
    case = layer_case()
    workload = workload_for(case, torch.device("cpu"))
    batch, mask = workload.tokens(0), torch.zeros(16, dtype=torch.int32)
    mask[4:8] = 1
    w1, w2 = workload.local_weights(1)
    live = torch.tensor([batch.hidden.shape[0]], dtype=torch.int32)
    ours = make_aiter_experts(case)(ExpertInput(*batch, num_local_tokens=live), ExpertWeights(w1, w2, mask))
    theirs = torch_moe(batch.hidden, w1, w2, batch.weights, batch.ids, expert_mask=mask)
    assert torch.equal(ours.view(torch.int16), theirs.view(torch.int16))
