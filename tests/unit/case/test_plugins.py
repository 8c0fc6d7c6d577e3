"""Plugins: names, references, properties, options, and what a file may not name."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import msgspec
import pytest

from distbench.case import plugins
from distbench.case.contract import check_stated
from distbench.case.identity import case_hash, case_values
from distbench.case.injection import own_faults
from distbench.case.plugins import (
    KINDS,
    NoOptions,
    Plugin,
    canonical_options,
    check_name,
    load_plugin,
    options_of,
    parse_options,
    reference_of,
)
from distbench.case.resolve import FLAGS, Layer, resolve_case
from distbench.case.spec import Case
from distbench.cli.shrink import code_flags
from distbench.errors import InvalidCase, Unsupported
from distbench.faults.injector import FAULTS
from distbench.tools.bisect import swaps_of
from tests.brought_plugins import Options

TINY = {"model": "tiny", "max_dispatch_tokens_per_rank": 64, "numerics": "exact", "device": "cpu"}
OPTIONED = "tests.brought_plugins:OPTIONED"


def flagged(**values: Any) -> Case:
    return resolve_case([Layer(FLAGS, TINY | values)], 2).case


@pytest.fixture
def acme(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed transport acme."""
    entry = EntryPoint("acme", OPTIONED, "distbench.transports")
    monkeypatch.setattr(plugins, "installed", lambda part: {"acme": entry} if part == "transport" else {})


@pytest.mark.parametrize("part", KINDS)
def test_built_in_parts_are_plugins_found_by_their_references(part: str) -> None:
    for name in filter("own".__ne__, KINDS[part].built_in):
        found = load_plugin(part, name)
        assert found.name == name
        assert found.options is NoOptions or name in KINDS[part].guests


def test_names_of_built_in_parts_read_no_metadata_and_load_no_torch() -> None:
    code = (
        "import sys; from distbench.case.resolve import Layer, resolve_case; "
        "resolve_case([Layer('flag', {'transport': 'mori', 'experts': 'triton', 'model': 'tiny'})], 2); "
        "print(sorted({'torch', 'importlib.metadata', 'distbench.plugins'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"[]\n"


@pytest.mark.parametrize("name", ["acme", "own:make", "own.parts:Factory.make"])
@pytest.mark.usefixtures("acme")
def test_installed_names_and_references_are_accepted_unloaded(name: str) -> None:
    check_name("transport", name)
    case = flagged(transport=name)
    assert case.plugins == [f"transport {name}"]
    assert case.stand_ins == ["reference for aiter"]


@pytest.mark.parametrize(
    "name", ["", "acmee", "own:", ":make", "own make", "a:b:c", "own:m\n", "x" * 199 + ":y", "ö:y"]
)
@pytest.mark.usefixtures("acme")
def test_other_names_are_refused_with_those_that_exist(name: str) -> None:
    with pytest.raises(
        InvalidCase, match=r"^--transport = .*allowed are collective, symmetric, mori, deepep, acme, or package.module:"
    ):
        flagged(transport=name)


def test_a_reference_is_itself_and_an_entry_point_leads_to_its_value(acme: None) -> None:  # noqa: ARG001 - a fixture
    assert reference_of("transport", "own:make") == "own:make"
    assert reference_of("transport", "acme") == OPTIONED
    assert load_plugin("transport", "acme").version == "1.2"


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("nowhere:make", InvalidCase, "there is no module nowhere"),
        ("tests.nowhere:make", InvalidCase, "there is no module tests.nowhere"),
        ("tests.brought_plugins:missing", InvalidCase, "no attribute 'missing'"),
        ("tests.brought_plugins:NOT_CALLABLE", InvalidCase, "is a int; allowed are a distbench.plugins.Plugin and a"),
        ("needing:make", Unsupported, "it needs the package absent_package, which is not installed"),
        ("needs_chip:make", Unsupported, "no such chip"),
        ("wrong_inside:make", InvalidCase, r"wrong_inside cannot be imported \(AttributeError: module 'os' has no"),
        ("broken:make", InvalidCase, r"broken cannot be imported \(ZeroDivisionError: division by zero\)"),
    ],
)
def test_what_cannot_be_loaded_is_named_with_the_fix(
    name: str, error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needing.py").write_text("import absent_package\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "wrong_inside.py").write_text("import os\nos.no_such_thing\n")
    (tmp_path / "needs_chip.py").write_text(
        "from distbench.errors import Unsupported\nraise Unsupported('no such chip')\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(error, match=f"^transport {name}: .*{message}"):
        load_plugin("transport", name)


def test_a_reference_finds_modules_of_the_working_directory_behind_all_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "of_here.py").write_text("def make(context): ...\n")
    (tmp_path / "json.py").write_text("1 / 0\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    found = load_plugin("experts", "of_here:make")
    assert (found.name, found.version, found.options) == ("of_here:make", "", NoOptions)
    assert sys.path[-1] == str(tmp_path)


@pytest.mark.parametrize("key", ["transport", "experts", "caller"])
@pytest.mark.parametrize("source", ["file:case.toml", "suite:s.toml", "bundle:b", "report:r.json", "env:X"])
def test_only_a_flag_may_name_a_plugin(key: str, source: str) -> None:
    with pytest.raises(InvalidCase, match=f"^{source}: {key} = 'own:make' names code to execute; give --{key} too"):
        resolve_case([Layer(source, {key: "own:make"})], 2)
    others = {"experts": "aiter", "emulate": True} if key == "caller" else {}
    both = [Layer(FLAGS, {key: "other:make"} | others), Layer(source, {key: "own:make"})]
    assert getattr(resolve_case(both, 2).case, key) == "other:make"


@pytest.mark.parametrize("text", ["own:Fault", "flipped-bit;own.parts:Fault:rank=1", "doubled"])
def test_only_a_flag_may_name_a_fault_of_a_plugin(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("doubled", "own:Fault", "distbench.faults")
    monkeypatch.setattr("distbench.case.injection.installed", lambda _: {"doubled": entry})
    with pytest.raises(InvalidCase, match=f"^file:c: inject = '{text}' names code to execute; give --inject too"):
        resolve_case([Layer("file:c", {"inject": text})], 2)
    assert flagged(inject=text).inject == text
    assert resolve_case([Layer("file:c", TINY | {"inject": "flipped-bit:rank=1"})], 2).case.inject


def test_fault_of_a_plugin_named_like_an_own_one_hides_it_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("flipped-bit", "own:Fault", "distbench.faults")
    monkeypatch.setattr("distbench.case.injection.installed", lambda _: {"flipped-bit": entry})
    text = "flipped-bit:rank=1;mutant:name=gelu-for-silu"
    assert resolve_case([Layer("file:c", TINY | {"inject": text})], 2).case.inject == text


def test_own_faults_are_known_without_torch() -> None:
    assert own_faults() == {*FAULTS, "mutant"}


@pytest.mark.parametrize("source", ["flag", "file:case.toml"])
def test_own_faults_read_no_metadata(source: str) -> None:
    code = (
        "import sys; from distbench.case.resolve import Layer, resolve_case; "
        f"resolve_case([Layer({source!r}, {{'inject': 'flipped-bit:rank=1', 'model': 'tiny'}})], 2); "
        "print('importlib.metadata' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"False\n"


def test_options_are_part_of_the_hash_in_one_order_and_absent_without_any() -> None:
    first = flagged(transport="own:make", transport_option="b=2; a=1")
    second = flagged(transport="own:make", transport_option="a=1;b=2")
    assert first.transport_option == "a=1;b=2"
    assert case_hash(first) == case_hash(second) != case_hash(flagged(transport="own:make"))
    assert "transport_option" not in case_values(flagged())


@pytest.mark.parametrize("text", ["a", "=1", "a b=1", "a=1;a=2", "1=2", "a=1;;b"])
def test_options_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(InvalidCase, match=r"^transport_option = .*several are joined by semicolons"):
        parse_options("transport_option", text)


def test_options_keep_commas_and_equals_signs_of_their_values() -> None:
    assert parse_options("k", "sizes=1,2; path=/a=b ;empty=") == {"sizes": "1,2", "path": "/a=b", "empty": ""}
    assert canonical_options("k", "") == ""


def test_options_of_a_built_in_part_are_refused() -> None:
    with pytest.raises(InvalidCase, match="experts_option = a=1: experts reference has no options"):
        flagged(experts_option="a=1")


def test_options_that_a_file_gives_a_plugin_go_with_it() -> None:
    file = Layer("file:c", TINY | {"transport": "own:make", "transport_option": "a=1"})
    assert resolve_case([Layer(FLAGS, {"transport": "collective"}), file], 2).case.transport_option == ""
    assert resolve_case([Layer(FLAGS, {"transport": "own:make"}), file], 2).case.transport_option == "a=1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("facto=1", r"optioned has no such option \(did you mean factor\?\); allowed are factor"),
        ("factor=9", "optioned refuses it .*<= 8"),
        ("factor=two", "optioned refuses it .*Expected `int`"),
    ],
)
def test_options_are_checked_against_the_plugins_type(text: str, message: str) -> None:
    plugin = load_plugin("transport", OPTIONED)
    assert options_of(plugin, "transport_option", "factor=8") == Options(factor=8)
    with pytest.raises(InvalidCase, match=message):
        options_of(plugin, "transport_option", text)


def test_options_of_a_plugin_without_any_are_refused_by_name() -> None:
    with pytest.raises(InvalidCase, match="x has no such option; allowed are none"):
        options_of(Plugin(make=print, name="x"), "experts_option", "a=1")


@pytest.mark.parametrize(
    ("stated", "values", "device", "lacking"),
    [
        ({"devices": ("cuda",)}, {}, "cpu", "device = cpu"),
        ({"dtypes": ("bf16",)}, {"dispatch_dtype": "fp8"}, "cpu", "dispatch_dtype = fp8"),
        ({"zero_tokens": False}, {"tokens": (0, 1)}, "cpu", "ranks without tokens"),
        ({"negative_ids": False}, {"dropped_slots": 0.1}, "cpu", "ids of -1"),
        ({"negative_ids": False}, {"dropped_tokens": 0.1}, "cpu", "ids of -1"),
        ({}, {"two_batch_overlap": True}, "cpu", "two_batch_overlap"),
    ],
)
def test_a_case_that_needs_what_a_transport_does_not_state_is_unsupported(
    stated: dict[str, Any], values: dict[str, Any], device: str, lacking: str
) -> None:
    case = flagged(transport="own:make", **values)
    with pytest.raises(Unsupported, match=f"^transport own:make: states no support of {lacking}; drop it"):
        check_stated(Plugin(make=print, **stated), "transport", case, device)
    check_stated(Plugin(make=print, two_batch_overlap=True), "transport", case, device)


def test_graphs_are_a_property_of_experts() -> None:
    case = msgspec.structs.replace(flagged(experts="own:make"), graph=True)
    with pytest.raises(Unsupported, match="experts own:make: states no support of graph"):
        check_stated(Plugin(make=print), "experts", case, "")
    check_stated(Plugin(make=print), "transport", case, "")


def test_bisect_swaps_a_plugin_and_its_options_for_a_trusted_part(tmp_path: Path) -> None:
    case = flagged(transport="own:make", transport_option="a=1", experts="own:rows", experts_option="b=2", limit="off")
    swaps = {swap.part: swap.changes for swap in swaps_of(case, tmp_path)}
    assert swaps["transport"] == {"transport": "collective", "transport_option": ""}
    assert swaps["experts"] == {"experts": "reference", "experts_option": ""}
    assert "kernel" not in swaps


def test_flags_that_a_written_case_needs_name_its_plugins() -> None:
    assert code_flags(flagged(transport="own:make", transport_option="a=1")) == " --transport own:make"
    assert code_flags(flagged(inject="hang;own:Fault")) == " --inject 'hang;own:Fault'"
