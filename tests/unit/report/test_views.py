"""Structs that read part of a report have the keys and types of the schema."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import msgspec
import pytest

from distbench.report.html.view import Pictured
from distbench.report.journal import Line
from distbench.report.limit import LimitReport
from distbench.report.results import Result
from distbench.report.schema import LostReport, Report, ReportView
from tests.cases import tiny_case
from tests.reports import report_of

STORED = sorted((Path(__file__).parents[2] / "data" / "e296384" / "reports").glob("*.json"))


def differences(view: Any, schema: Any, where: str = "") -> list[str]:
    """Places at which a view's type reads something else than the schema writes."""
    if view == schema:
        return []
    if _is_struct(view) and schema == dict[str, Any]:  # what such a table holds is seen in real reports only
        return []
    if _is_struct(view) and _is_struct(schema):
        return _differing_fields(view, schema, where)
    if get_origin(view) == get_origin(schema) is not None and len(get_args(view)) == len(get_args(schema)):
        pairs = zip(get_args(view), get_args(schema), strict=True)
        return [found for one, other in pairs for found in differences(one, other, where)]
    return [f"{where}: {view} is not {schema}"]


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _differing_fields(view: type[msgspec.Struct], schema: type[msgspec.Struct], where: str) -> list[str]:
    types, wanted = get_type_hints(view), get_type_hints(schema)
    needed = {field.name for field in msgspec.structs.fields(schema) if field.required}
    found = []
    for field in msgspec.structs.fields(view):
        place = f"{where}.{field.name}"
        if field.name not in wanted:
            found.append(f"{place}: no key of the schema")
        elif field.required and field.name not in needed and place != ".schema":
            found.append(f"{place}: older reports lack it")
        else:
            found += differences(types[field.name], wanted[field.name], place)
    return found


def read_by(view: Any, content: bytes) -> Any:
    return msgspec.to_builtins(msgspec.json.decode(content, type=view))


def is_part(part: Any, whole: Any) -> bool:
    """Whether `part` is `whole` without some keys."""
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(key in whole and is_part(part[key], whole[key]) for key in part)
    if isinstance(part, list):
        return len(part) == len(whole) and all(map(is_part, part, whole))
    return bool(part == whole)


def views(base: type = ReportView) -> list[type]:
    own: list[type] = base.__subclasses__()
    return own + [found for view in own for found in views(view)]


def test_readers_of_results_are_views() -> None:
    assert {Line, Pictured, Result} <= set(views())


@pytest.mark.parametrize("view", views())
def test_view_has_keys_and_types_of_the_schema(view: type) -> None:
    assert differences(view, Report) == []


@pytest.mark.parametrize("view", views())
@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_view_reads_values_of_stored_reports(view: type, path: Path) -> None:
    assert is_part(read_by(view, path.read_bytes()), read_by(Report, path.read_bytes()))


@pytest.mark.parametrize("view", views())
def test_view_reads_values_of_a_new_report(view: type) -> None:
    content = msgspec.json.encode(report_of(tiny_case(2), "experts: other values"))
    assert is_part(read_by(view, content), read_by(Report, content))


class _Lost(msgspec.Struct):
    rows: str


class _Differing(msgspec.Struct):
    verdicts: str
    exit_code: float
    inputs_version: int
    lost: _Lost
    limit: LimitReport
    ranks: dict[str, Any]


def test_view_that_differs_from_the_schema_is_found() -> None:
    found = {line.partition(":")[0]: line for line in differences(_Differing, Report)}
    assert sorted(found) == [".exit_code", ".inputs_version", ".limit", ".lost.rows", ".ranks", ".verdicts"]
    assert (found[".verdicts"], found[".inputs_version"]) == (
        ".verdicts: no key of the schema",
        ".inputs_version: older reports lack it",
    )
    assert differences(LostReport, LostReport) == []
    assert not is_part({"rows": 1, "more": 2}, {"rows": 1})
    assert not is_part([{"rows": 1}], [{"rows": 2}])
