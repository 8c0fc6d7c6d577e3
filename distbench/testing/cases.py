"""Cases that tests ask for: gathered, checked one by one, and run together."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from filelock import FileLock

from distbench import api
from distbench.case.expectations import ALLOWED, is_expectation
from distbench.case.resolve import FLAGS, Layer, resolve_case
from distbench.case.spec import DERIVED_KEYS, FIELD_DEFAULTS
from distbench.case.suite import load_suite
from distbench.errors import DistbenchError, InvalidCase, Unsupported, Verdict
from distbench.launcher.preflight import check_case, check_devices

if TYPE_CHECKING:
    import pytest

_RANKS = 8
_OWN = ("ranks", "expect", "suite")
_CASE_OF_SUITE = "_distbench_case"


class Request(NamedTuple):
    """A case that a test asks for: its name among those of a suite, its keys, ranks, and expected ending."""

    name: str
    keys: Mapping[str, Any]
    ranks: int
    expect: str

    @property
    def digest(self) -> str:
        """Name of the file of its result."""
        return hashlib.sha256(msgspec.json.encode([self.keys, self.ranks, self.expect], order="sorted")).hexdigest()


class Ended(NamedTuple):
    """How a request has ended: its report, or why none was made, and whether this machine supports it."""

    report: api.Report | None
    refused: str = ""
    supported: bool = True


def cases_of_suite(folder: Path, asked: Mapping[str, Any]) -> list[Request]:
    """Cases of a suite by name or file, relative to `folder`; other keys of the marker replace theirs.

    Raises:
        InvalidCase: the suite cannot be read, or a case makes no sense.
    """
    ranks = int(asked.get("ranks", _RANKS))
    keys = api.Case(**{key: value for key, value in asked.items() if key not in _OWN}).keys
    path = folder / str(asked["suite"])
    name = str(path) if path.exists() else str(asked["suite"])
    requests = []
    for entry in load_suite(name, ranks, [Layer(FLAGS, keys)]).entries:
        given = {key for key, source in entry.sources.items() if source.startswith((FLAGS, "suite:"))}
        own = {
            key: one
            for key, one in msgspec.to_builtins(entry.case).items()
            if key not in DERIVED_KEYS and (key in given or one != FIELD_DEFAULTS.get(key))
        }
        requests.append(Request(entry.name, own, ranks, entry.expect))
    return requests


def request_of(item: pytest.Item) -> Request:
    """The request of a marked item.

    Raises:
        InvalidCase: a wrong key of the marker.
    """
    of_suite: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
    if _CASE_OF_SUITE in of_suite:
        request: Request = of_suite[_CASE_OF_SUITE]
        return request
    asked = marked(item)
    if "suite" in asked:
        message = (
            f"marker distbench of {item.name}: suite: its cases are items of a function or of a plain class's method"
        )
        raise InvalidCase(message)
    keys = api.Case(**{key: value for key, value in asked.items() if key not in _OWN}).keys
    ranks, expect = asked.get("ranks", _RANKS), asked.get("expect", Verdict.PASS.value)
    if not isinstance(ranks, int) or ranks < 1:
        message = f"marker distbench of {item.name}: ranks = {ranks!r:.40}; allowed are whole numbers from 1"
        raise InvalidCase(message)
    if not is_expectation(str(expect)):
        message = f"marker distbench of {item.name}: expect = {expect!r:.80}; allowed is {ALLOWED}"
        raise InvalidCase(message)
    return Request("", keys, ranks, str(expect))


def marked(item: pytest.Item) -> dict[str, Any]:
    """Keywords of an item's markers: its own win over those of its class, these over its module's.

    Raises:
        InvalidCase: a marker with other arguments than keywords.
    """
    found: dict[str, Any] = {}
    for marker in item.iter_markers("distbench"):  # the closest first
        if marker.args:
            message = f"marker distbench of {item.name}: takes keywords only, such as ranks=2"
            raise InvalidCase(message)
        found = dict(marker.kwargs) | found
    return found


class Runs:
    """Results of all requests of a run of pytest, made together when the first is asked for."""

    def __init__(self, requests: Mapping[str, Request], folder: Path) -> None:
        """`requests` by item; `folder` is shared by all workers."""
        self._requests, self._folder = requests, folder
        self._refused: dict[str, Ended | None] = {}
        self._error: DistbenchError | None = None

    def outcome(self, item: pytest.Item) -> Ended:
        """The ending of an item's request; runs all requests that have none yet, once.

        Raises:
            DistbenchError: they cannot be run; the same one for each request.
        """
        request = self._requests[item.nodeid]
        refused = self._refusal(request)
        if refused is not None:
            return refused
        path = self._path(request)
        with FileLock(self._folder / "lock"):
            if not path.exists():
                self._run_once()
        return msgspec.json.decode(path.read_bytes(), type=_Result).ended

    def _run_once(self) -> None:
        if self._error is not None:
            raise self._error
        try:
            self._run()
        except DistbenchError as error:
            self._error = error
            raise

    def _run(self) -> None:
        """Run what can run and has no result: one launch for a number of ranks and the plugins that are named."""
        left = {one.digest: one for one in self._requests.values() if not self._path(one).exists()}
        by_ranks: dict[int, list[Request]] = {}
        for request in left.values():
            if self._refusal(request) is None:
                by_ranks.setdefault(request.ranks, []).append(request)
        for ranks, requests in by_ranks.items():
            cases = [api.Case(**request.keys) for request in requests]
            reports = api.suite(cases, ranks=ranks, expect=[request.expect for request in requests])
            for request, report in zip(requests, reports, strict=True):
                self._path(request).write_bytes(msgspec.json.encode(_Result(report)))

    def _refusal(self, request: Request) -> Ended | None:
        """Why a request cannot run here; None where it can."""
        if request.digest not in self._refused:
            found = None
            try:
                case = resolve_case([Layer(FLAGS, request.keys)], request.ranks).case
                check_case(case)
                check_devices([case], request.ranks)
            except InvalidCase as error:
                found = Ended(None, str(error))
            except Unsupported as error:
                found = Ended(None, str(error), supported=False)
            self._refused[request.digest] = found
        return self._refused[request.digest]

    def _path(self, request: Request) -> Path:
        return self._folder / f"{request.digest}.json"


class _Result(msgspec.Struct, frozen=True):
    """File of a request's report."""

    report: api.Report

    @property
    def ended(self) -> Ended:
        """The report, unless ranks refused the case."""
        verdict, reasons = self.report.verdict, self.report.reasons
        if self.report.as_expected or verdict not in (Verdict.INVALID, Verdict.UNSUPPORTED):
            return Ended(self.report)
        return Ended(None, reasons[0].message, supported=verdict is not Verdict.UNSUPPORTED)
