"""Profiles: their values and sources, their place among the layers, and when their program's code runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest

from distbench.case import atom_env, profiles, vllm_env
from distbench.case.environment import read_environment, reader
from distbench.case.identity import case_values
from distbench.case.profiles import NO_PROFILE, PROFILES
from distbench.case.resolve import FLAGS, Layer, Resolved, resolve_case
from distbench.case.sglang_env import near_misses
from distbench.case.sglang_epv2 import epv2_notes
from distbench.case.sglang_releases import COMBINE_DTYPE, EP_V2, LIMIT, RECV_BOUND, SDMA
from distbench.case.spec import FIELD_TYPES
from distbench.case.suite import load_suite
from distbench.case.variables import PACKAGE_KEYS
from distbench.cli.main import main
from distbench.errors import InvalidCase, Unsupported
from distbench.launcher.unused_variables import unused_variables
from distbench.transport.mori.config import Launch, plan_mori
from tests.cases import tiny_case

SGLANG = {
    "transport": "mori",
    "experts": "aiter",
    "mori_kernel": "auto",
    "inter_kernel_switch": 256,
    "mori_geometry": "sglang",
    "max_dispatch_tokens_per_rank": 4096,
    "dispatch_dtype": "bf16",
    "combine_quant": "none",
    "combine_input": "external",
    "limit": "off",
    "sorting_policy": 2,
}
OTHERS = {key: value for key, value in SGLANG.items() if key != "max_dispatch_tokens_per_rank"} | {
    "inter_kernel_switch": 0,
    "sorting_policy": 0,
}
VALUES: dict[str, dict[str, Any]] = {
    "sglang-epv1-decode": SGLANG,
    "sglang-epv1-prefill": SGLANG | {"tokens": (64, 33, 0, 7)},
    "sglang-epv1-lowlatency": SGLANG | {"mori_kernel": "AsyncLL"},
    "vllm": OTHERS | {"mori_geometry": "vllm"},
    "atom-native": OTHERS
    | {"mori_geometry": "atom-decode", "limit": "sum", "atom_rule": "native", "atom_graph_bs": 16},
    "atom-vllm-plugin": OTHERS
    | {"mori_geometry": "atom-decode", "limit": "max-recv", "atom_rule": "vllm-plugin", "atom_graph_bs": 0},
}


def resolved(
    profile: str, environ: dict[str, str] | None = None, file: dict[str, Any] | None = None, **flags: Any
) -> Resolved:
    """A case of four ranks, as `run` resolves it."""
    layers = [Layer(FLAGS, {"profile": profile, "emulate": "true"} | flags, strict=False)]
    layers += [Layer("file:case.toml", file)] if file else []
    return resolve_case([*layers, *read_environment(environ or {}, layers)], 4)


@pytest.fixture(autouse=True)
def _nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles, "find_spec", lambda _: None)


@pytest.mark.parametrize("name", PROFILES)
def test_profile_sets_exactly_its_values_each_with_its_source(name: str) -> None:
    found = resolved(name)
    own = PROFILES[name].values
    assert {key: getattr(found.case, key) for key in own} == VALUES[name]
    assert {key for key, source in found.sources.items() if source == f"profile:{name}"} == own.keys()
    assert all(
        re.search(r"0\.5\.23|0\.33\.0|ffdf3bb5d|^distbench: ", one.source) for one in PROFILES[name].values.values()
    )


def test_names_of_profiles_are_the_values_of_their_key() -> None:
    assert get_args(get_args(FIELD_TYPES["profile"])[0]) == (NO_PROFILE, *PROFILES)


def test_case_without_a_profile_has_no_key_of_one() -> None:
    plain = resolve_case([], 4)
    assert not {"profile", "mori_geometry"} & {*case_values(plain.case), *plain.sources}
    assert not plain.notes
    assert resolve_case([Layer("test", {"profile": "none"})], 4).case == plain.case


def test_flags_the_file_and_the_environment_are_stronger_than_the_profile_and_presets_weaker() -> None:
    environ = {LIMIT: "100", COMBINE_DTYPE: "fp8", "AITER_KSPLIT": "2"}
    found = resolved("sglang-epv1-decode", environ, {"limit": 50, "combine_input": "registered"}, dispatch_dtype="fp8")
    case = found.case
    assert (case.limit, case.combine_quant, case.aiter_ksplit) == ("50", "fp8_blockwise", 2)
    assert (case.combine_input, case.dispatch_dtype, case.topk) == ("registered", "fp8", 8)
    wanted = {
        "limit": "file:case.toml",
        "combine_quant": f"env:{COMBINE_DTYPE}",
        "dispatch_dtype": FLAGS,
        "transport": "profile:sglang-epv1-decode",
        "topk": "preset:qwen3-30b-a3b",
    }
    assert {key: found.sources[key] for key in wanted} == wanted


def test_profile_of_a_flag_wins_over_that_of_a_file_and_an_unknown_one_is_refused() -> None:
    assert resolved("vllm", file={"profile": "atom-native"}).case.mori_geometry == "vllm"
    with pytest.raises(InvalidCase, match=r"--profile = .*allowed are none, sglang-epv1-decode"):
        resolved("sglang")


DECODE = {"profile": "sglang-epv1-decode"}
INSTALLED = DECODE | {"installed": "sglang"}
VLLM, ATOM = {"profile": "vllm"}, {"profile": "atom-native"}


@pytest.mark.parametrize(
    ("flags", "file", "caller", "note"),
    [
        (DECODE, {}, "own", "no package sglang here; install it, or give --caller-wheel"),
        (DECODE | {"caller": "own"}, {}, "own", ""),
        (DECODE | {"caller": "sglang"}, {}, "sglang", ""),
        (INSTALLED, {}, "sglang", ""),
        (DECODE | {"wheel": "sglang.whl"}, {}, "sglang", ""),
        ({"installed": "sglang"}, DECODE, "own", "no flag names it; give --profile or --caller"),
        ({"wheel": "sglang.whl"}, DECODE, "sglang", ""),
        (INSTALLED | {"graph": "true"}, {}, "own", "not with graph"),
        (INSTALLED | {"experts": "reference"}, {}, "own", "not with experts reference"),
        (INSTALLED | {"profile": "sglang-epv1-lowlatency"}, {}, "own", "low-latency mode is not lifted"),
        (DECODE | {"wheel": "vllm.whl"}, {}, "own", "no package sglang here"),
        ({"wheel": "vllm.whl"}, VLLM, "vllm", ""),
        (VLLM, {}, "own", "no package vllm here; install it, or give --caller-wheel"),
        (INSTALLED | VLLM, {}, "own", "no package vllm here"),
        (ATOM, {}, "own", "no folder has its text; give --caller-folder, a checkout"),
        ({"folder": "yes"}, ATOM, "atom", ""),
        (ATOM | {"folder": "yes", "wheel": "vllm.whl"}, {}, "atom", ""),
        (VLLM | {"folder": "yes", "wheel": "vllm.whl"}, {}, "vllm", ""),
        (ATOM | {"folder": "yes", "atom_graph_bs": "9"}, {}, "own", "a rank has 16 tokens"),
        (VLLM | {"wheel": "vllm.whl", "policy": "unchecked"}, {}, "own", "its own cut loses no row"),
    ],
    ids=str,
)
def test_code_of_the_profiles_program_runs_where_a_flag_names_it_and_it_is_there(  # noqa: PLR0913 - a table
    flags: dict[str, str], file: dict[str, Any], caller: str, note: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = dict(flags)
    if given.pop("installed", ""):
        monkeypatch.setattr(profiles, "find_spec", lambda name: name if name == "sglang" else None)
    if wheel := given.pop("wheel", ""):
        (tmp_path / wheel).write_bytes(b"")
        given["caller_wheel"] = str(tmp_path / wheel)
    if given.pop("folder", ""):
        (tmp_path / "atom").mkdir()
        given["caller_folder"] = str(tmp_path)
    layers = [Layer(FLAGS, {"emulate": "true"} | given, strict=False), Layer("file:case.toml", file)]
    found = resolve_case(layers, 4)
    assert found.case.caller == caller
    assert bool(found.notes) == bool(note)
    assert all(note in one for one in found.notes)
    if caller == "atom":
        assert not found.case.caller_wheel
    if caller != "own" and "caller" not in flags:
        assert found.sources["caller"] == f"profile:{found.case.profile}"


@pytest.mark.parametrize(
    ("profile", "environ", "effect"),
    [
        ("sglang-epv1-decode", {LIMIT: "64"}, "limit=64"),
        ("sglang-epv1-decode", {RECV_BOUND: "1"}, "recv_bound=True"),
        ("sglang-epv1-decode", {SDMA: "1"}, "mori_kernel=AsyncLL"),
        ("sglang-epv1-decode", {COMBINE_DTYPE: "fp8"}, "combine_quant=fp8_blockwise"),
        ("sglang-epv1-decode", {"VLLM_ROCM_USE_AITER": "0"}, "unused: nothing that distbench runs reads it"),
        ("sglang-epv1-decode", {"ATOM_MORI_V2": "1"}, "unused: nothing that distbench runs reads it"),
        ("vllm", {LIMIT: "64"}, "unused: profile vllm: vLLM does not read it"),
        ("vllm", {LIMIT: "many"}, "unused: profile vllm: vLLM does not read it"),
        ("vllm", {EP_V2: "1"}, "unused: profile vllm: vLLM does not read it"),
        ("vllm", {"SGLANG_MORI_NUM_WORKERS": "1"}, "unused: profile vllm: vLLM does not read it"),
        ("vllm", {SDMA: "1"}, "unused: the stand-in of mori does not read it"),
        ("vllm", {"MORI_EP_LAUNCH_CONFIG_MODE": "AUTO"}, "launch_mode=AUTO"),
        ("vllm", {"AITER_KSPLIT": "2"}, "aiter_ksplit=2"),
        ("vllm", {"MORI_MOE_MAX_INPUT_TOKENS": "1"}, "unused: the stand-in of mori does not read it"),
        ("vllm", {"VLLM_ROCM_USE_AITER": "True"}, ""),
        ("vllm", {"VLLM_ROCM_USE_AITER": "0"}, "refused: MoRI needs aiter's fused_moe"),
        ("vllm", {"VLLM_ROCM_USE_AITER_MOE": "False"}, "refused: production would end with an assertion"),
        (
            "vllm",
            {"VLLM_ROCM_USE_AITER": "yes"},
            "refused: allowed are true, 1, false, 0; production would read it",
        ),
        ("vllm", {"VLLM_ROCM_USE_AITER_FUSION_SHARED_EXPERTS": "1"}, "refused: without shared experts"),
        ("vllm", {"VLLM_ROCM_USE_AITER_FUSION_SHARED_EXPERTS": "0"}, ""),
        ("vllm", {"VLLM_ROCM_USE_AITER_MOE_A4W4_DSV4": "1"}, "unsupported: quantises activations to fp4"),
        ("vllm", {"VLLM_ROCM_USE_AITER_MOE_A4W4_DSV4": "0"}, ""),
        ("vllm", {"VLLM_ROCM_AITER_MOE_DISPATCH_POLICY": "1"}, "sorting_policy=1"),
        ("vllm", {"VLLM_ROCM_AITER_MOE_DISPATCH_POLICY": "3"}, "refused: aiter has policies 0, 1 and 2"),
        ("vllm", {"VLLM_ROCM_AITER_MOE_DISPATCH_POLICY": "two"}, "refused: production would end with a ValueError"),
        ("sglang-epv1-decode", {"SGLANG_AITER_MOE_SORTING_DISPATCH_POLICY": "0"}, "sorting_policy=0"),
        ("none", {"SGLANG_AITER_MOE_SORTING_DISPATCH_POLICY": "2"}, ""),
        ("vllm", {"VLLM_ROCM_USE_AITER_MLA": "1"}, "unused: not of vLLM's MoRI path"),
        ("vllm", {"VLLM_ROCM_USE_AITER_MOES": "1"}, "unused: vLLM 0.33.0 does not read it"),
        ("vllm", {"VLLM_MORI_LIMIT": "1"}, "unused: vLLM 0.33.0 does not read it"),
        ("vllm", {"ATOM_MORI_COMBINE_QUANT": "fp8_blockwise"}, "unused: profile vllm: vLLM does not read it"),
        ("atom-native", {"ATOM_MORI_COMBINE_QUANT": "fp8_blockwise"}, "combine_quant=fp8_blockwise"),
        ("atom-native", {"ATOM_MORI_COMBINE_QUANT": "fp8"}, "refused: fail when mori's operator is made"),
        ("atom-native", {"ATOM_MORI_V2": "1"}, "unsupported: env:ATOM_MORI_V2: production takes MoRI's second API"),
        ("atom-native", {"ATOM_MORI_V2": "0"}, ""),
        ("atom-native", {"ATOM_MORI_V2": "true"}, "refused: production would read it as off"),
        ("atom-native", {"ATOM_MORI_V2_FUSED": "1"}, "unused: ATOM reads it with ATOM_MORI_V2=1 alone"),
        ("atom-native", {"ATOM_MORI_FP4_DISPATCH": "1"}, "unsupported: production dispatches fp4 rows"),
        ("atom-native", {"ATOM_MORI_FP4_DISPATCH": "0"}, ""),
        ("atom-native", {"ATOM_MOE_GU_ITLV": "1"}, "unused: not of ATOM's MoRI path"),
        ("atom-vllm-plugin", {"VLLM_ROCM_USE_AITER": "0"}, "unused: profile atom-vllm-plugin: ATOM does not read it"),
        ("atom-vllm-plugin", {RECV_BOUND: "1"}, "unused: profile atom-vllm-plugin: ATOM does not read it"),
    ],
    ids=str,
)
def test_environment_is_read_as_the_profiles_program_reads_it(
    profile: str, environ: dict[str, str], effect: str
) -> None:
    kind, _, text = effect.partition(": ")
    if kind in ("refused", "unsupported"):
        with pytest.raises(InvalidCase if kind == "refused" else Unsupported, match=re.escape(text)) as caught:
            resolved(profile, environ)
        assert next(iter(environ)) in str(caught.value)
        return
    found = resolved(profile, environ)
    lines = unused_variables(environ, found.case, found.sources)
    assert [line.partition("(")[2][:-1] for line in lines] == ([text] if kind == "unused" else [])
    if "=" in kind:
        key, _, value = kind.partition("=")
        assert str(getattr(found.case, key)) == value
        assert found.sources[key] == f"env:{next(iter(environ))}"
    elif kind == "unused":
        assert found.case == resolved(profile).case


AITER_ON = {"SGLANG_USE_AITER": "yes"}


@pytest.mark.parametrize(
    ("values", "environ", "reason"),
    [
        ({"model": "qwen3-30b-a3b"}, AITER_ON, "model qwen3-30b-a3b is not deepseek-v4"),
        ({"model": "deepseek-v4"}, {}, "SGLANG_USE_AITER is off"),
        ({"model": "deepseek-v4"}, {"SGLANG_USE_AITER": "0"}, "SGLANG_USE_AITER is off"),
        ({"model": "deepseek-v4"}, AITER_ON | {SDMA: "1"}, "MORI_ENABLE_SDMA is on"),
        ({"model": "deepseek-v4", "tp_size": "16"}, AITER_ON, "16 ranks are more than one host's 8"),
        ({"model": "deepseek-v4", "topk": "8"}, AITER_ON, "model custom is not deepseek-v4"),
        ({"model": "deepseek-v4"}, AITER_ON, "UNSUPPORTED"),
        ({"model": "deepseek-v4", "sglang_version": "0.5.22"}, AITER_ON, "UNSUPPORTED"),
        ({"model": "deepseek-v4", "sglang_version": "0.5.21"}, AITER_ON, ""),
        ({"model": "deepseek-v4"}, AITER_ON | {EP_V2: "false"}, ""),
        ({"model": "deepseek-v4"}, AITER_ON | {EP_V2: " "}, "UNSUPPORTED"),
    ],
    ids=str,
)
def test_epv1_of_sglang_runs_where_production_falls_back_to_it(
    values: dict[str, Any], environ: dict[str, str], reason: str
) -> None:
    case = resolved("sglang-epv1-decode", environ, **values).case
    if reason == "UNSUPPORTED":
        with pytest.raises(Unsupported, match=f"env:{EP_V2} is unset: SGLang .* takes MoRI's second API"):
            epv2_notes(environ, case)
        return
    notes = epv2_notes(environ, case)
    assert bool(notes) == bool(reason)
    assert all(note.endswith(f"falls back to EPv1, as here: {reason}") for note in notes)


@pytest.mark.parametrize("profile", ["none", "vllm", "atom-native"])
def test_choice_of_sglangs_api_is_not_made_without_its_profile(profile: str) -> None:
    assert epv2_notes(AITER_ON, resolved(profile, model="deepseek-v4").case) == ()


def test_explicit_second_api_is_unsupported_whatever_its_reasons_say() -> None:
    with pytest.raises(Unsupported, match=f"env:{EP_V2}: production takes MoRI's EPv2"):
        resolved("sglang-epv1-decode", {EP_V2: "true"})


@pytest.mark.parametrize(
    ("geometry", "values", "launch", "queue_pairs"),
    [
        ("sglang", {}, Launch(80, 0, 16), 2),
        ("sglang", {"gpu_per_node": 2}, Launch(64, 32, 8), 2),
        ("vllm", {}, Launch(80, 0, 16), 1),
        ("vllm", {"gpu_per_node": 2}, Launch(32, 16, 16), 1),
        ("vllm", {"gpu_per_node": 2, "cu_count": 256}, Launch(64, 32, 8), 1),
        ("atom-decode", {}, Launch(64, 0, 16), 1),
        ("atom-decode", {"gpu_per_node": 2}, Launch(64, 4, 16), 1),
        ("atom-prefill", {}, Launch(128, 0, 16), 1),
        ("atom-prefill", {"gpu_per_node": 2}, Launch(128, 16, 16), 1),
        ("atom-prefill", {"cu_count": 80}, Launch(80, 0, 16), 1),
        ("atom-decode", {"mori_kernel": "AsyncLL"}, Launch(64, 32, 8), 2),
    ],
    ids=str,
)
def test_launch_geometry_is_the_programs(
    geometry: str, values: dict[str, Any], launch: Launch, queue_pairs: int
) -> None:
    case = tiny_case(4, transport="mori", emulate=True, mori_geometry=geometry, **values)
    plan = plan_mori(case, {})
    assert (plan.launch, plan.num_qp_per_pe) == (launch, queue_pairs)


@pytest.mark.parametrize(("profile", "kernel"), [("vllm", "InterNodeV1"), ("sglang-epv1-decode", "InterNodeV1LL")])
def test_kernel_between_nodes_is_the_programs(profile: str, kernel: str) -> None:
    case = resolved(profile, gpu_per_node="2", max_dispatch_tokens_per_rank="64").case
    assert plan_mori(case, {}).kernel == kernel


def test_suite_reads_the_environment_by_each_cases_profile_and_release(tmp_path: Path) -> None:
    file = tmp_path / "some.toml"
    axes = 'profile = ["none", "sglang-epv1-decode", "vllm"]\nsglang_version = ["", "0.5.10"]'
    file.write_text(f'[defaults]\nmodel = "tiny"\nemulate = true\n[axes]\n{axes}\n')
    entries = load_suite(str(file), 4, (), reader({LIMIT: "96"})).entries
    assert [one.case.limit for one in entries] == ["96", "sum32", "96", "off", "off", "off"]
    assert [bool(one.warnings) for one in entries] == [False, False, True, True, True, True]


def test_names_like_sglangs_are_looked_for_by_sglang_alone() -> None:
    environ = {"MORI_MOE_MAX_INPUT_TOKENS": "64"}
    assert near_misses(environ)
    assert not unused_variables(environ, resolved("sglang-epv1-decode").case, {})
    assert unused_variables(environ, resolved("vllm").case, {})


def test_profiles_are_listed_with_their_values_and_sources(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profiles"]) == 0
    listed = capsys.readouterr().out
    assert all(f"{name}: {profile.about}" in listed for name, profile in PROFILES.items())
    for name, profile in PROFILES.items():
        assert main(["profiles", name]) == 0
        shown = capsys.readouterr().out
        assert all(f"\n{key}: {one.source}\n" in shown for key, one in profile.values.items())
        assert f"caller: {profile.caller or 'none, '}" in shown


def test_every_variable_of_a_profiles_program_is_documented() -> None:
    text = (Path(__file__).parents[3] / "docs" / "profiles.md").read_text(encoding="utf-8")
    own = {*vllm_env.KEYS, *vllm_env.CHECKED, *atom_env.KEYS, *atom_env.CHECKED} - PACKAGE_KEYS.keys()
    assert all(f"`{name}`" in text for name in (*own, EP_V2, *PROFILES))


@pytest.mark.parametrize(
    ("flags", "bucket"),
    [({}, 16), ({"tokens": "3,9,0,4"}, 9), ({"tokens": "3", "atom_graph_bs": "8"}, 8), ({"tokens": "0"}, 0)],
    ids=str,
)
def test_bucket_of_atoms_decode_batch_is_that_of_its_fullest_rank(flags: dict[str, Any], bucket: int) -> None:
    found = resolved("atom-native", **flags)
    assert found.case.atom_graph_bs == bucket
    assert found.sources["atom_graph_bs"] == (FLAGS if "atom_graph_bs" in flags else "profile:atom-native")
