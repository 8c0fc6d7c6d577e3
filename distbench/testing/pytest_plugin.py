"""The pytest plugin `distbench`: a case is a test (docs/pytest.md). Unused, it loads nothing of the bench.

All cases that pytest has selected run in as few launches as possible, when the first of them is called. With xdist the
workers take turns, and read what another one has run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from distbench.api import Report
    from distbench.testing.cases import Runs

_MARKER = "distbench"
_CASE_OF_SUITE = "_distbench_case"
_HELP = (
    "distbench(ranks=8, expect='PASS', suite='', **keys): run a case of these keys, which may name a transport and "
    "experts by class, or each case of a suite file; the test fails where a case does not end as expected"
)


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line("markers", _HELP)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make an item of each case of a suite that a marker names."""
    if metafunc.definition.get_closest_marker(_MARKER) is None:
        return
    from distbench.testing.cases import cases_of_suite, marked  # noqa: PLC0415 - only where the marker is used

    asked = _checked(marked, metafunc.definition)
    if "suite" not in asked:
        return
    requests = _checked(cases_of_suite, metafunc.definition.path.parent, asked)
    metafunc.fixturenames.append(_CASE_OF_SUITE)
    metafunc.parametrize(_CASE_OF_SUITE, requests, ids=[one.name for one in requests], indirect=True)


@pytest.fixture
def _distbench_case(request: pytest.FixtureRequest) -> Any:
    """The case of an item that a suite has made."""
    return request.param


@pytest.fixture
def distbench(request: pytest.FixtureRequest) -> Report:
    """The report of the test's case."""
    report: Report = _report_of(request.node)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fail a test whose case does not end as expected, with the verdict and the diagnosis as text."""
    if item.get_closest_marker(_MARKER) is not None:
        report = _report_of(item)
        if not report.as_expected:
            pytest.fail(f"{report}\nexpected {report.expect}; case {report.case['hash'][:12]}", pytrace=False)
    return (yield)


def _report_of(item: pytest.Item) -> Any:
    runs = _runs(item.session)
    if item.get_closest_marker(_MARKER) is None:
        message = "the fixture distbench has the report of a case: mark the test with pytest.mark.distbench(…)"
        raise pytest.UsageError(message)
    report, refused, supported = _checked(runs.outcome, item)
    if not supported:
        pytest.skip(refused)
    if report is None:
        pytest.fail(f"INVALID: {refused}", pytrace=False)
    properties = {"distbench_verdict": report.verdict.value, "distbench_case": report.case["hash"]}
    item.user_properties.extend(
        (name, one) for name, one in properties.items() if name not in dict(item.user_properties)
    )
    return report


_RUNS = pytest.StashKey["Runs"]()


def _runs(session: pytest.Session) -> Runs:
    """Cases of all selected items, gathered once for a session."""
    stash = session.config.stash
    if _RUNS not in stash:
        from distbench.testing.cases import Runs, request_of  # noqa: PLC0415 - only where the marker is used

        marked = [one for one in session.items if one.get_closest_marker(_MARKER) is not None]
        requests = {one.nodeid: _checked(request_of, one) for one in marked}
        stash[_RUNS] = Runs(requests, _shared_folder(session.config))
    return stash[_RUNS]


def _shared_folder(config: pytest.Config) -> Any:
    """A folder of this run of pytest, the same one for all workers of xdist."""
    base = config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]  # noqa: SLF001 - it has no other name
    folder = (base.parent if hasattr(config, "workerinput") else base) / "distbench"
    folder.mkdir(exist_ok=True)
    return folder


def _checked(call: Any, *arguments: Any) -> Any:
    from distbench.errors import DistbenchError  # noqa: PLC0415 - only where the marker is used

    try:
        return call(*arguments)
    except DistbenchError as error:
        told = f"distbench: {error}"
    return pytest.fail(told, pytrace=False)
