"""JSON Schemas of case and suite files, and of reports: they accept what is read and written, and no other keys."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import msgspec
import pytest

from distbench.case.json_schema import case_schema, suite_schema
from distbench.case.spec import DERIVED_KEYS, FIELD_HINTS
from distbench.case.suite_file import builtin_suites
from distbench.case.templates import case_template, suite_template
from distbench.cli.main import main
from tests.cases import tiny_case
from tests.reports import report_of

CASE = jsonschema.Draft202012Validator(case_schema())
SUITE = jsonschema.Draft202012Validator(suite_schema())


def test_schema_of_a_case_has_every_key_that_a_file_may_have_with_its_text() -> None:
    properties = case_schema()["properties"]
    assert set(properties) == set(FIELD_HINTS) - set(DERIVED_KEYS)
    assert all(one["description"] for one in properties.values())
    assert "required" not in case_schema()


@pytest.mark.parametrize("suite", builtin_suites())
def test_built_in_suites_keep_the_schema(suite: str) -> None:
    SUITE.validate(msgspec.toml.decode(builtin_suites()[suite]))


def test_files_of_init_keep_the_schema() -> None:
    CASE.validate(msgspec.toml.decode(case_template("case.toml", "tiny")))
    SUITE.validate(msgspec.toml.decode(suite_template("suite.toml", "tiny")))


@pytest.mark.parametrize(
    "case", [{"tokens": [0, 1, "..."]}, {"tokens": 4}, {"limit": 64}, {"limit": "max-recv"}, {"bias": True}]
)
def test_forms_of_a_value_that_a_file_may_have_keep_the_schema(case: dict[str, Any]) -> None:
    CASE.validate(case)


@pytest.mark.parametrize(
    "case", [{"tokns": 1}, {"tokens": -1}, {"tokens": ["…"]}, {"policy": "lax"}, {"seed": 0.5}, {"bias": "yes"}]
)
def test_what_a_case_file_may_not_have_breaks_the_schema(case: dict[str, Any]) -> None:
    assert not CASE.is_valid(case)
    assert not SUITE.is_valid({"include": [case]})


@pytest.mark.parametrize("suite", [{"axis": {}}, {"axes": {"seed": []}}, {"expect": [{"match": {}}]}])
def test_what_a_suite_file_may_not_have_breaks_the_schema(suite: dict[str, Any]) -> None:
    assert not SUITE.is_valid(suite)


def test_command_prints_the_schema_of_reports_which_keep_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", "report"]) == 0
    jsonschema.validate(
        json.loads(msgspec.json.encode(report_of(tiny_case(), "cause"))), json.loads(capsys.readouterr().out)
    )


@pytest.mark.parametrize("document", ["case", "suite"])
def test_command_prints_the_schema_of_files(document: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", document]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == f"distbench {document}"
