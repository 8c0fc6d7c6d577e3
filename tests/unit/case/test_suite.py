"""Suites: product of the axes, include, exclude, expectations, selection, and refusals."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from distbench.case.entry import Entry
from distbench.case.expectations import BY_LIMIT, CODES, is_expectation, is_met
from distbench.case.identity import case_hash
from distbench.case.resolve import Layer
from distbench.case.stages import LAYER_STAGES
from distbench.case.suite import Suite, load_suite, select
from distbench.case.suite_file import builtin_suites, parse_suite
from distbench.errors import InvalidCase, Verdict

Load = Callable[..., Suite]
BUILTIN = sorted(builtin_suites())


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load(text: str, ep_size: int = 4, *overrides: Layer, environment: tuple[Layer, ...] = ()) -> Suite:
        file = tmp_path / "some.toml"
        file.write_text(text)
        return load_suite(str(file), ep_size, overrides, lambda _: environment)

    return load


def names(suite: Suite) -> list[str]:
    return [entry.name for entry in suite.entries]


def test_suite_axes_form_a_product_whose_last_axis_varies_fastest(load: Load) -> None:
    suite = load('[defaults]\nmodel = "tiny"\n[axes]\nlimit = ["sum", 5]\nseed = [2, 1]')
    assert names(suite) == ["limit=sum seed=2", "limit=sum seed=1", "limit=5 seed=2", "limit=5 seed=1"]
    assert {entry.case.model for entry in suite.entries} == {"tiny"}
    assert suite.name == "some"
    assert suite.entries[0].sources["seed"] == "suite:some"
    assert suite.entries[0].sources["topk"] == "preset:tiny"


def test_table_on_a_suite_axis_varies_its_keys_together(load: Load) -> None:
    suite = load('[axes]\nshape = [{model="tiny"}, {model="tiny-odd", tokens=3}]\nseed = [0, {seed = 1, limit = 8}]')
    assert [(case.model, case.tokens[0], case.seed, case.limit) for case in cases(suite)] == [
        ("tiny", 16, 0, "sum32"),
        ("tiny", 16, 1, "8"),
        ("tiny-odd", 3, 0, "sum32"),
        ("tiny-odd", 3, 1, "8"),
    ]
    assert names(suite)[-1] == "model=tiny-odd tokens=3 seed=1 limit=8"


def cases(suite: Suite) -> list[Any]:
    return [entry.case for entry in suite.entries]


@pytest.mark.parametrize(
    ("ep_size", "tokens"), [(1, (0,)), (3, (0, 1, 7)), (4, (0, 1, 7, 33)), (6, (0, 1, 7, 33, 0, 1))]
)
def test_ellipsis_in_tokens_repeats_the_pattern_over_all_ranks(
    load: Load, ep_size: int, tokens: tuple[int, ...]
) -> None:
    suite = load('[defaults]\nmodel = "tiny"\n[axes]\ntokens = [[0, 1, 7, 33, "..."]]', ep_size)
    assert names(suite) == ["tokens=0,1,7,33,..."]
    assert cases(suite)[0].tokens == tokens


def test_included_cases_follow_the_product_of_axes(load: Load) -> None:
    suite = load(
        'tags = ["all"]\n[defaults]\nmodel = "tiny"\nseed = 9\n[axes]\nlimit = ["off"]\n'
        '[[include]]\nname = "my own"\ntags = ["mine", "all"]\nexpect = "DRIFT"\nseed = 4\n[[include]]\ntopk = 2'
    )
    assert names(suite) == ["limit=off", "my own", "topk=2"]
    assert [entry.tags for entry in suite.entries] == [("all",), ("all", "mine"), ("all",)]
    assert [entry.expect for entry in suite.entries] == [BY_LIMIT, "DRIFT", BY_LIMIT]
    assert [(case.seed, case.limit) for case in cases(suite)] == [(9, "off"), (4, "sum32"), (9, "sum32")]


def test_exclude_removes_combinations_of_the_product_only(load: Load) -> None:
    suite = load(
        '[axes]\nlimit = ["0", 7, 8]\ntokens = [3, [3, "..."], 4]\n'
        '[[exclude]]\nlimit = "off"\ntokens = 3\n[[exclude]]\nlimit = 7\n[[exclude]]\npolicy = "guard"\n'
        "[[include]]\nlimit = 7"
    )
    assert names(suite) == ["limit=off tokens=4", "limit=8 tokens=3", "limit=8 tokens=4", "limit=7"]


def test_exclude_can_match_ep_size(load: Load) -> None:
    text = '[axes]\nlimit = ["off", 7]\n[[exclude]]\nep_size = 1\nlimit = 7'
    assert names(load(text, 1)) == ["limit=off"]
    assert names(load(text, 2)) == ["limit=off", "limit=7"]


def test_first_matching_expectation_applies(load: Load) -> None:
    suite = load(
        '[axes]\nlimit = ["off", 1, 2]\npolicy = ["guard", "strict"]\n'
        '[[expect]]\nverdict = "PASS"\nmatch = {limit = 1, policy = "guard"}\n'
        '[[expect]]\nverdict = "UNDER_LIMIT"\nmatch = {limit = "1"}\n[[expect]]\nverdict = "HANG"\nmatch = {limit = 2}'
    )
    assert [entry.expect for entry in suite.entries] == [BY_LIMIT, BY_LIMIT, "PASS", "UNDER_LIMIT", "HANG", "HANG"]


def test_equal_cases_run_once_under_the_first_name(load: Load) -> None:
    suite = load('[axes]\nlimit = [0, "off", 5]\n[[include]]\nname = "again"\nlimit = 5')
    assert names(suite) == ["limit=off", "limit=5"]


EQUAL = '[defaults]\nmodel = "tiny"\n[axes]\nseed = [1, 2]\n[[include]]\nname = "far"\ntags = ["damage"]\nseed = 2\n'


def test_merged_equal_cases_have_the_tags_of_all(load: Load) -> None:
    suite = load(EQUAL)
    assert [(entry.name, entry.tags) for entry in suite.entries] == [("seed=1", ()), ("seed=2", ("damage",))]


def test_equal_cases_with_different_expectations_are_refused_unless_flags_made_them_equal(load: Load) -> None:
    text = EQUAL + 'expect = "UNDER_LIMIT"\n'
    told = (
        r"some\.toml: case far: expect = UNDER_LIMIT, but it equals case seed=2, which is expected to end as by-limit"
    )
    with pytest.raises(InvalidCase, match=told):
        load(text)
    with pytest.raises(InvalidCase, match=told):
        load(text, 4, Layer("flags", {"timeout": 9}))
    (entry,) = load(text, 4, Layer("flags", {"seed": 3})).entries
    assert (entry.name, entry.expect) == ("default", BY_LIMIT)


def test_cases_with_equal_names_are_numbered(load: Load) -> None:
    suite = load(
        "".join(f'[[include]]\nname = "{name}"\nseed = {seed}\n' for seed, name in enumerate(["a", "a #2"] * 2))
    )
    assert names(suite) == ["a", "a #2", "a #3", "a #2 #2"]


def test_override_flags_win_over_suite_keys_and_keep_case_names(load: Load) -> None:
    text = '[axes]\nlimit = ["off", 1]\nseed = [1, 2]\n[[expect]]\nverdict = "UNDER_LIMIT"\nmatch = {limit = 1}'
    suite = load(text, 4, Layer("flag", {"limit": "77"}, strict=False), environment=(Layer("env:X", {"limit": 5}),))
    assert names(suite) == ["seed=1", "seed=2"]
    assert [(entry.case.limit, entry.expect) for entry in suite.entries] == [("77", BY_LIMIT)] * 2
    assert suite.entries[0].sources["limit"] == "flag"
    weaker = load("[axes]\nseed = [1, 2]", environment=(Layer("env:X", {"limit": 5, "seed": 3}),))
    assert [(case.limit, case.seed) for case in cases(weaker)] == [("5", 1), ("5", 2)]


def test_a_case_may_take_fewer_ranks_but_not_more(load: Load) -> None:
    assert cases(load('[defaults]\nmodel = "tiny"\n[axes]\nep_size = [1, 3]'))[1].tokens == (16, 16, 16)
    with pytest.raises(InvalidCase, match=r"ep_size = 5 \(suite:some\): the launch has 4 ranks"):
        load("[axes]\nep_size = [1, 5]")


def test_suite_in_json_equals_the_suite_in_toml(tmp_path: Path) -> None:
    file = tmp_path / "some.json"
    file.write_bytes(msgspec.json.encode({"name": "other", "description": "why", "axes": {"seed": [1, 2]}}))
    suite = load_suite(str(file), 2)
    assert (suite.name, suite.description, names(suite)) == ("other", "why", ["seed=1", "seed=2"])


WRONG = {
    'nam = "x"': r"unknown key 'nam' \(did you mean name\?\); allowed are name, description",
    'name = "a\\nb"': r"name = 'a\\nb': allowed is one line",
    "tags = [1]": "tags = 1: allowed is text",
    'tags = ["a,b"]': "tags = 'a,b': allowed is words without",
    "defaults = 3": "defaults = 3: allowed is a table",
    "[defaults]\ntokns = 3": r"defaults: unknown key 'tokns' \(did you mean tokens\?\); allowed are model, hidden_size",
    '[defaults]\nkernel_table_sha256 = "0"': "unknown key 'kernel_table_sha256'",
    "[axes]\nseed = 3": "axes.seed = 3: allowed is a list of one value or more",
    "[axes]\nseed = []": "axes.seed = .*: allowed is a list of one value or more",
    '[axes]\nseed = [1, "x"]': r"axes.seed\[1\]: seed = 'x': allowed are whole numbers",
    "[axes]\nshape = [1]": r"axes.shape\[0\]: unknown key 'shape'",
    "[axes]\nshape = [{}]": r"axes.shape\[0\] = {}: allowed is a table of one case key or more",
    "[axes]\nseed = [1]\nb = [{seed = 2}]": "axes.b: seed is varied by axes.seed already",
    '[axes]\npolicy = ["lax"]': "policy = 'lax': allowed are strict, unchecked, guard",
    f"[defaults]\ntokens = {[7] * 1025}": r"defaults: tokens = .*: allowed is a list of up to 1024; end it in",
    '[axes]\nlimit = ["max"]': r"axes.limit\[0\]: limit = 'max': allowed are off",
    "[axes]\nlimit = [-1]": r"axes.limit\[0\]: limit = -1: production takes",
    "[axes]\ntopk = [999]": "case topk=999: topk = 999: above num_experts",
    "[axes]\ntokens = [[1, 2]]": "case tokens=1,2: tokens: 2 numbers for 4 ranks",
    '[axes]\ntokens = [["..."]]': "case tokens=.*: tokens: 0 numbers for 4 ranks",
    '[axes]\ntokens = [[1, "...", 2]]': r"axes.tokens\[0\]: tokens = .*allowed are whole numbers; number 2 is none",
    f"[axes]\nseed = {list(range(400))}\ncu_count = {list(range(1, 400))}": "axes: 159600 cases; allowed are up to",
    "\n".join(["[axes]", *(f"{key} = {[1] * 999}" for key in ("seed", "topk", "repeats", "cu_count"))]): "far too many",
    "": "no cases; give",
    "[defaults]\nseed = 1": "no cases; give",
    "[axes]\nseed = [1]\n[[exclude]]\nseed = 1": r"\[\[exclude\]\] leaves no case",
    "include = 3": "include = 3: allowed is a list of tables",
    "include = [3]": r"include\[0\] = 3: allowed is a table",
    '[[include]]\nexpect = "GOOD"': r"include\[0\].expect = 'GOOD': allowed is by-limit, by-kernel, INVALID",
    "[[include]]\nverdict = 1": r"include\[0\]: unknown key 'verdict'; allowed are name, tags, expect, model",
    "[[exclude]]\nname = 1": r"exclude\[0\]: unknown key 'name'",
    "[[expect]]\nmatch = {seed = 1}": r"expect\[0\].verdict = None: allowed is by-limit",
    '[[expect]]\nverdict = "PASS"\nmatch = {sed = 1}': r"expect\[0\].match: unknown key 'sed'",
    "[axes]\nseed = [1]\n" + "[[exclude]]\nseed = 2\n" * 101: "exclude: 101 tables; allowed are up to 100",
    "[axes]\nseed = [0x" + "f" * 5000 + "]": "seed = int too large to show",
    "[axes]\nlimit = [0x" + "f" * 5000 + "]": "limit = int too large to show",
    "a." * 600 + "a = 1": "more than 500 dots on line 1",
    "#" * (257 << 10): "more than 262144 bytes",
    "seed = ": "not valid TOML",
}


@pytest.mark.parametrize("text", WRONG, ids=lambda text: text[:30])
def test_invalid_suite_is_refused_in_one_line(load: Load, text: str) -> None:
    with pytest.raises(InvalidCase, match=r"some\.toml") as caught:
        load(text)
    caught.match(WRONG[text])
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("depth", range(900, 1000, 9))
def test_deeply_nested_lists_in_a_suite_are_refused_in_one_line(depth: int) -> None:
    with pytest.raises(InvalidCase, match=r"not valid JSON|seed = "):
        parse_suite("deep.json", b'{"defaults":{"seed":' + b"[" * depth + b"]" * depth + b"}}")


@pytest.mark.parametrize("name", ["smok", "", "a\nb", "no/such.toml", "\0.toml", "smoke.yaml"])
def test_unknown_suite_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(
        InvalidCase, match=r"allowed are capacity, conformance, limits, .* or the path|cannot be read"
    ) as caught:
        load_suite(name, 2)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("ep_size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("name", BUILTIN)
def test_built_in_suites_fit_any_number_of_ranks(name: str, ep_size: int) -> None:
    suite = load_suite(name, ep_size)
    assert suite.name == name
    assert suite.description
    assert len(suite.entries) >= 8
    assert len({case_hash(entry.case) for entry in suite.entries}) == len(suite.entries)
    assert len(set(names(suite))) == len(suite.entries)
    assert {entry.case.ep_size for entry in suite.entries} == {ep_size}
    assert all(entry.case.hidden_size <= 256 and name in entry.tags for entry in suite.entries)


def test_built_in_suites_ignore_production_variables() -> None:
    layer = Layer("env", {"limit": 1, "max_dispatch_tokens_per_rank": 2, "prealloc_max_recv_tokens": 3})
    for name in BUILTIN:
        for entry in load_suite(name, 4, environment=lambda _: [layer, Layer("env", {"recv_bound": True})]).entries:
            assert not any(source == "env" for source in entry.sources.values())


@pytest.mark.parametrize(
    ("expect", "verdict", "safe", "policy", "expected"),
    [
        (BY_LIMIT, Verdict.PASS, True, "strict", True),
        (BY_LIMIT, Verdict.UNDER_LIMIT, True, "strict", False),
        (BY_LIMIT, Verdict.UNDER_LIMIT, False, "strict", True),
        (BY_LIMIT, Verdict.UNDER_LIMIT, False, "unchecked", True),
        (BY_LIMIT, Verdict.PASS, False, "unchecked", False),
        (BY_LIMIT, Verdict.PASS, False, "guard", True),
        (BY_LIMIT, Verdict.OVERFLOW, True, "strict", False),
        ("OVERFLOW", Verdict.OVERFLOW, None, "strict", True),
        ("PASS", Verdict.UNDER_LIMIT, False, "strict", False),
    ],
)
def test_result_is_as_expected_if_verdict_and_codes_match(
    expect: str, verdict: Verdict, safe: bool, policy: str, expected: bool
) -> None:
    assert is_expectation(expect)
    assert is_met(expect, verdict, [], safe=safe, policy=policy) is expected


@pytest.mark.parametrize(
    ("expect", "verdict", "codes", "expected"),
    [
        ("CORRUPT:experts-differs", Verdict.CORRUPT, ["experts-differs"], True),
        ("CORRUPT:experts-differs", Verdict.CORRUPT, ["experts-differs", "nan"], False),
        ("CORRUPT:experts-differs,nan", Verdict.CORRUPT, ["experts-differs", "nan"], True),
        ("CORRUPT:experts-differs,nan", Verdict.CORRUPT, ["nan"], True),
        ("CORRUPT:experts-differs", Verdict.BASELINE_WRONG, ["experts-differs"], False),
        ("CORRUPT", Verdict.CORRUPT, ["experts-differs", "nan"], True),
        ("NONDETERMINISTIC", Verdict.CORRUPT, ["nan"], False),
    ],
)
def test_expectation_with_codes_rejects_any_other_reason(
    expect: str, verdict: Verdict, codes: list[str], expected: bool
) -> None:
    assert is_expectation(expect)
    assert is_met(expect, verdict, codes, safe=True, policy="strict") is expected


@pytest.mark.parametrize("text", ["", "by-limit:nan", "CORRUPT:", "CORRUPT:none", "PASS:nan", "WRONG", "CORRUPT:nan,"])
def test_impossible_expectation_is_refused(text: str) -> None:
    assert not is_expectation(text)


def test_every_reason_code_is_accepted_in_an_expectation() -> None:
    source = Path("distbench/verify/rules.py").read_text() + Path("distbench/verify/excuses.py").read_text()
    written = {code for code in re.findall(r'code="([a-z-]+)"', source) if code != "guarded"}
    assert written | {f"{stage}-differs" for stage in LAYER_STAGES} <= set(CODES)


@pytest.fixture
def entries(load: Load) -> tuple[Entry, ...]:
    return load(
        '[axes]\nlimit = ["off", "max-recv", "max-recv-1"]\nrecv_bound = [true, false]\n'
        '[[include]]\nname = "odd one"\ntags = ["odd"]\ntokens = [1, 2, "..."]\nlimit = 5\n'
    ).entries


@pytest.mark.parametrize(
    ("expression", "count"),
    [
        ("", 7),
        ("odd", 1),
        ("!odd", 6),
        ("limit=max-recv", 2),
        ("limit=max-recv*", 4),
        ("limit=max-recv*, recv_bound=true", 2),
        ("!limit=off,! recv_bound=true", 3),
        ("tokens=16", 6),
        ("tokens=1?2*", 1),
        ("name~recv-1", 2),
        ("name~recv-?", 0),
        ("name~*recv-? *", 2),
        ("!name~limit", 1),
        ("policy=strict", 7),
    ],
)
def test_select_terms_choose_the_matching_cases(entries: tuple[Entry, ...], expression: str, count: int) -> None:
    if not count:
        with pytest.raises(InvalidCase, match="no case is left; tags are odd, keys are model, hidden_size"):
            select(entries, expression)
        return
    assert len(select(entries, expression)) == count


@pytest.mark.parametrize("expression", ["od", "!od", "sed=1", "!", "title~odd", "limit", "a\nb"])
def test_malformed_select_term_is_refused(entries: tuple[Entry, ...], expression: str) -> None:
    with pytest.raises(InvalidCase, match="is no tag, key=value or name~text; tags are odd, keys are model") as caught:
        select(entries, expression)
    assert len(str(caught.value).splitlines()) == 1
