"""aiter: buckets, tiles, lookup, arguments and types that the selection and the adapter assume, by release."""

from __future__ import annotations

import ast
import itertools
import re
from functools import cache, partial
from typing import Literal

import torch

from distbench.experts.aiter import emulated as stand_in
from distbench.experts.aiter.adapter import make_aiter_experts
from distbench.experts.base import ExpertInput, ExpertWeights
from distbench.experts.selection import heuristics
from distbench.experts.selection.choice import LayerKey, TunedKey, padded_rows, rules_for
from distbench.utils.amd_arch import fp8_format
from tests.cases import tiny_case
from tests.contract.facts.fact import Fact
from tests.contract.facts.source import Gone, Source, signature

PACKAGE = "aiter"
MOE = "aiter/fused_moe.py"
TYPES = "aiter/utility/dtypes.py"
CORE = "aiter/jit/core.py"
TABLE = "aiter/configs/tuned_fmoe.csv"
ENUMS = "aiter_meta/csrc/include/aiter_enum.h"
TILES = "aiter_meta/csrc/ck_gemm_moe_2stages_codegen/gen_instances.py"

_ROWS = tuple(sorted({rows for power in range(19) for rows in (0, (1 << power) - 1, 1 << power, (1 << power) + 1)}))
_UNITS = (304, 256, 80)
_LAYERS = ((32, 8, 2048), (33, 9, 2048), (256, 8, 256), (16, 2, 1024))
_ARCHITECTURES = ("gfx942", "gfx950")
_LOG = "[fused_moe] using {'1stage' if run_1stage else '2stage'}"


def _buckets(source: Source) -> dict[int, int]:
    names = ["nextPow2", "get_padded_M"]
    if "_PADDED_M_TIERS" in source.read(MOE):
        names.append("_PADDED_M_TIERS")
    theirs = source.lifted(MOE, names, {})["get_padded_M"]
    return {rows: theirs(rows) for rows in _ROWS}


def _our_buckets(version: str) -> dict[int, int]:
    rules = rules_for(version)
    return {rows: padded_rows(rows, rules) for rows in _ROWS}


def _blocks(source: Source) -> dict[str, int]:
    found = {}
    for units in _UNITS:
        given = {"get_cu_num": partial(int, units)}
        theirs = source.lifted(MOE, ["get_block_size_M"], given)["get_block_size_M"]
        for experts, topk, inter in _LAYERS:
            for rows in _ROWS[1:]:
                found[f"{rows} rows, layer {experts}/{topk}/{inter}, {units} units"] = theirs(
                    rows, topk, experts, inter
                )
    return found


def _our_blocks(version: str) -> dict[str, int]:
    rules, found = rules_for(version), {}
    for units in _UNITS:
        for experts, topk, inter in _LAYERS:
            key = LayerKey(
                num_local_experts=experts, topk=topk, model_dim=7168, inter_dim=inter, cu_count=units, is_ep=False
            )
            for rows in _ROWS[1:]:
                name = f"{rows} rows, layer {experts}/{topk}/{inter}, {units} units"
                found[name] = heuristics.block_rows(rows, key, rules)
    return found


def _topk(source: Source) -> bool:
    """Whether top-k counts one less with an expert mask."""
    return "topk -= int(is_ep)" in ast.unparse(source.definition(MOE, "get_2stage_cfgs"))


def _selecting(source: Source) -> str:
    """Text of the file that has the selection."""
    source.definition(MOE, "get_2stage_cfgs")
    return source.read(MOE)


def _overrides(source: Source) -> dict[str, bool]:
    text = _selecting(source)
    return {name: f'os.environ.get("{name}"' in text for name in ("AITER_KSPLIT", "AITER_BYPASS_TUNE_CONFIG")} | {
        "AITER_KSPLIT of -1": 'int(os.environ.get("AITER_KSPLIT", "0")) != -1' in text
    }


def _our_overrides(version: str) -> dict[str, bool]:
    rules = rules_for(version)
    names = ("AITER_KSPLIT", "AITER_BYPASS_TUNE_CONFIG")
    return dict.fromkeys(names, rules.reads_overrides) | {"AITER_KSPLIT of -1": rules.unsplit_tuned}


def _fallback(source: Source) -> bool:
    """Whether a tier without a row takes that of a lower one."""
    return "for fallback_tier in reversed(" in _selecting(source)


@cache
def _passed() -> frozenset[str]:
    experts = make_aiter_experts(tiny_case(4, experts="aiter", emulate=True))
    rows, weights = torch.zeros(8, 256).bfloat16(), torch.zeros(8, 4)
    given = ExpertInput(rows, None, weights, weights.int(), torch.zeros(1, dtype=torch.int32))
    w1, w2 = (torch.zeros(4, 256, 128).bfloat16() for _ in range(2))
    return frozenset(experts.arguments(given, ExpertWeights(w1, w2, torch.zeros(32, dtype=torch.int32))))


def _arguments(source: Source) -> set[str]:
    """Arguments that are passed and not accepted, or required and not passed."""
    theirs = signature(source.definition(MOE, "fused_moe"))
    refused = {f"{name} is not accepted" for name in _passed() - theirs.keys()}
    required = {name for name, default in theirs.items() if not default}
    return refused | {f"{name} is required" for name in required - _passed()}


def _selection(source: Source) -> set[str]:
    """Arguments that the selection requires and the adapter does not know."""
    theirs = signature(source.definition(MOE, "get_2stage_cfgs"))
    experts = make_aiter_experts(tiny_case(4, experts="aiter", emulate=True))
    known = experts._selection_arguments(64).keys()  # noqa: SLF001
    return {name for name, default in theirs.items() if not default and name not in {*known, *_FILLED}}


_FILLED = ("is_shuffled", "is_ep", "bias1", "bias2", "hidden_pad", "intermediate_pad")


def _metadata(source: Source) -> set[str]:
    """Fields of a choice that the adapter reads."""
    body = source.definition(MOE, "MOEMetadata").body
    names = {ast.unparse(node.target) for node in body if isinstance(node, ast.AnnAssign)}
    return names & {"stage1", "stage2", "block_m", "ksplit", "run_1stage"}


def _log(source: Source) -> dict[str, bool]:
    text = source.read(MOE)
    return {
        "choice": _LOG in text and "{'default' if cfg is None else tag} for {keys} " in text,
        "kernels": 'tag = f"({kernelName1=}, {kernelName2=})"' in text,
    }


def _formats(source: Source) -> dict[str, str]:
    node = source.definition(TYPES, "defaultDtypes")
    found = dict(re.findall(r"'(gfx\w+)': \{'fp8': torch\.float8_(\w+)\}", ast.unparse(node)))
    return {arch: found.get(arch, "") for arch in _ARCHITECTURES}


def _enums(source: Source) -> dict[str, int]:
    text, found = source.read(ENUMS), {}
    for enum in (stand_in.ActivationType, stand_in.QuantType):
        matched = re.search(rf"enum class {enum.__name__}[^{{]*\{{(.*?)\}}", text, re.DOTALL)
        if matched is None:
            message = f"no enum {enum.__name__} in {ENUMS}"
            raise Gone(message)
        number = -1
        for line in re.sub(r"//[^\n]*", "", matched[1]).split(","):
            name, _, value = (word.strip() for word in line.partition("="))
            number = int(value) if value else number + 1
            if name in enum.__members__:
                found[f"{enum.__name__}.{name}"] = number
    return found


def _our_enums(_: str) -> dict[str, int]:
    return {
        f"{one.__name__}.{member.name}": member.value
        for one in (stand_in.ActivationType, stand_in.QuantType)
        for member in one
    }


def _columns(source: Source) -> set[str]:
    """Columns of the tuned table that a key or a choice is read from."""
    return set(source.read(TABLE).split("\n", 1)[0].strip().split(",")) & _OUR_COLUMNS


_OUR_COLUMNS = {name for name in TunedKey.__struct_fields__ if name != "gfx"} | {
    *("token", "block_m", "ksplit", "kernelName1", "kernelName2", "us", "run_1stage"),
}


def _table_path(source: Source) -> bool:
    return "AITER_CONFIG_FMOE_FILE" in source.read(CORE)


def _tiles(source: Source) -> dict[str, tuple[int, int, int]]:
    """Columns, K in elements and pipeline of CK's bf16 tiles, by device, stage, rows, and narrow or wide layers."""
    lists = dict(re.findall(r'^(A\w+)_heuristic_dispatch = """(.*?)"""', source.read(TILES), re.DOTALL | re.MULTILINE))
    found = {}
    for gfx, suffix in (("gfx942", ""), ("gfx950", "_gfx950")):
        for stage in (1, 2):
            names = [f"{types}_gemm{stage}{suffix}" for types in ("A16W16", "A16W16_A8W8")]
            name = next((one for one in names if one in lists), "")
            if not name:
                message = f"none of {', '.join(names)} in {TILES}"
                raise Gone(message)
            for rows, branch in re.findall(r"block_m == (\d+)\)(.*?)(?=else if \(block_m|\Z)", lists[name], re.DOTALL):
                tiles = re.findall(r"V(\d), 256, \d+, (\d+), (\d+)(/sizeof)?", branch)
                for width, (pipeline, columns, size, shared) in (("narrow", tiles[0]), ("wide", tiles[-1])):
                    k = int(size) // 2 if shared else int(size)
                    found[f"{gfx} stage {stage} rows {rows} {width}"] = (int(columns), k, int(pipeline))
    return {key: value for key, value in found.items() if key.split()[-2] in _TILE_ROWS}


_TILE_ROWS = ("32", "64", "128")
_STAGES: tuple[Literal[1, 2], ...] = (1, 2)


def _our_tiles(version: str) -> dict[str, tuple[int, int, int]]:
    found = {}
    for gfx, (width, inter) in itertools.product(_ARCHITECTURES, (("narrow", 192), ("wide", 2048))):
        key = LayerKey(num_local_experts=32, topk=8, model_dim=7168, inter_dim=inter, gfx=gfx)
        for stage, rows in itertools.product(_STAGES, _TILE_ROWS):
            name, k = heuristics.default_stage(stage, int(rows), key, rules_for(version))
            sizes = re.search(r"_n(\d+)_k\d+_v(\d)", name)
            if sizes is not None:
                found[f"{gfx} stage {stage} rows {rows} {width}"] = (int(sizes[1]), k, int(sizes[2]))
    return found


FACTS = (
    Fact("bucket of each number of rows", PACKAGE, MOE, _buckets, _our_buckets),
    Fact("rows of a tile without a tuned row", PACKAGE, MOE, _blocks, _our_blocks),
    Fact(
        "top-k counts one less under an expert mask",
        PACKAGE,
        MOE,
        _topk,
        lambda version: rules_for(version).ep_drops_topk,
    ),
    Fact(
        "a tier without a row takes that of a lower one",
        PACKAGE,
        MOE,
        _fallback,
        lambda version: rules_for(version).tier_fallback,
    ),
    Fact("variables that override the choice", PACKAGE, MOE, _overrides, _our_overrides),
    Fact("arguments of fused_moe", PACKAGE, MOE, _arguments, lambda _: set()),
    Fact("arguments of the selection", PACKAGE, MOE, _selection, lambda _: set()),
    Fact(
        "fields of a choice", PACKAGE, MOE, _metadata, lambda _: {"stage1", "stage2", "block_m", "ksplit", "run_1stage"}
    ),
    Fact("log line of a choice", PACKAGE, MOE, _log, lambda _: {"choice": True, "kernels": True}),
    Fact(
        "fp8 format of each architecture",
        PACKAGE,
        TYPES,
        _formats,
        lambda _: {one: fp8_format(one) for one in _ARCHITECTURES},
    ),
    Fact("numbers of activations and quantisations", PACKAGE, ENUMS, _enums, _our_enums),
    Fact("columns of the tuned table", PACKAGE, TABLE, _columns, lambda _: _OUR_COLUMNS),
    Fact("path of the tuned table", PACKAGE, CORE, _table_path, lambda _: True),
    Fact("tiles of CK without a tuned row", PACKAGE, TILES, _tiles, _our_tiles),
)
