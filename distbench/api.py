"""The bench from Python: in a script, a notebook or a test, and inside a torchrun job (docs/api.md).

`run`, `suite` and `sweep` start the ranks in processes of their own, as the command line does; this process loads no
torch. `run_in_group` runs a case on the ranks of a job that is under way. Names here change with a major version only.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from distbench.case.environment import reader
from distbench.case.expectations import BY_LIMIT
from distbench.case.plugins import KINDS, OPTION_KEYS
from distbench.case.resolve import FLAGS, Layer, load_case_file, typed_value
from distbench.case.spec import FIELD_HINTS, names_code
from distbench.case.suite import load_suite
from distbench.errors import (
    BrokenContract,
    Busy,
    DiskFull,
    DistbenchError,
    InvalidCase,
    LaunchFailed,
    ResultsLost,
    Unsupported,
    Verdict,
)
from distbench.report import schema
from distbench.report.journal import read_reports
from distbench.report.results import Results
from distbench.utils.text import counted

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch import Tensor

    from distbench.plugins import Dispatched, ExpertInput, ExpertWeights, TokenBatch

__all__ = [
    "BrokenContract",
    "Busy",
    "Case",
    "DiskFull",
    "DistbenchError",
    "InvalidCase",
    "LaunchFailed",
    "Report",
    "ResultsLost",
    "Unsupported",
    "Verdict",
    "run",
    "run_in_group",
    "suite",
    "sweep",
]

_ERRORS = {
    "BUSY": Busy,
    "DISK_FULL": DiskFull,
    "INVALID": InvalidCase,
    "LAUNCH_FAILED": LaunchFailed,
    "RESULTS_LOST": ResultsLost,
    "UNSUPPORTED": Unsupported,
}
_ENDING = re.compile(r"^distbench: ([A-Z_]+): (.*)$", re.MULTILINE)
"""The line of an error that ended a command; notes and progress begin with small letters."""
_REFUSED = {Verdict.INVALID: InvalidCase, Verdict.UNSUPPORTED: Unsupported}
_DEFAULT_RANKS = 8
_TOLD_CHARACTERS = 2000


class Case:
    """Keys of a case, as flags of `distbench run`: `Case(model="tiny", tokens=[3, 5], limit="max-recv-1")`.

    A key that is not given has its default. `transport` and `experts` also take the factory itself, or the class, which
    the ranks import by its module and name; `transport_option` and `experts_option` also take a mapping.
    """

    def __init__(self, **keys: Any) -> None:
        """Check each key.

        Raises:
            InvalidCase: an unknown key, a value that it does not take, or a factory that no rank could import.
        """
        self.keys: dict[str, Any] = {key: _plain(key, value) for key, value in keys.items()}
        for key, value in self.keys.items():
            typed_value(key, value, Layer("Case", {}))

    @classmethod
    def from_file(cls, path: str | Path, **keys: Any) -> Case:
        """Case of a .toml or .json file, in which `keys` replace others.

        Raises:
            InvalidCase: a file that cannot be read, a wrong key, or code that the file names and `keys` do not.
        """
        layer = load_case_file(str(path))
        for key, value in layer.values.items():
            if names_code(key, value) and key not in keys:
                message = f"{layer.source}: {key} = {value!r:.80} names code to execute; give {key} as an argument too"
                raise InvalidCase(message)
        return cls(**(dict(layer.values) | keys))

    def but(self, **keys: Any) -> Case:
        """Case with other values of `keys`."""
        return Case(**(self.keys | keys))

    def __repr__(self) -> str:
        """The case as it would be made."""
        return f"Case({', '.join(f'{key}={value!r}' for key, value in self.keys.items())})"


class Report(schema.Report, frozen=True, kw_only=True):
    """Report of a case: its `verdict`, `diagnosis`, `ranks`, and the other keys of report.json as attributes."""

    def to_json(self) -> str:
        """The document of report.json."""
        return msgspec.json.encode(self).decode()

    def __str__(self) -> str:
        """The verdict in one line, and below it the diagnosis and each reason."""
        from distbench.report.console import verdict_line  # noqa: PLC0415 - only where it is shown

        told = [f"diagnosis: {one.cause} ({one.confidence}): {one.evidence}" for one in self.diagnosis]
        told += [f"- {reason.message}" for reason in self.reasons[1:]]
        return "\n".join([verdict_line(self), *told])


def run(case: Case, *, ranks: int | None = None, out: str | Path | None = None) -> Report:
    """Run a case on `ranks` ranks (8, or the case's `ep_size`), started for it. A wrong result is a report, no error.

    `out` keeps the files that `distbench run --out` leaves.

    Raises:
        InvalidCase, Unsupported: the case was not run; the message says why, and the fix.
        Busy, LaunchFailed, DiskFull, ResultsLost: it could not be run now.
    """
    with _folder(out) as folder:
        path = folder / "report.json"
        path.unlink(missing_ok=True)
        told = _command("run", folder, ranks, case.keys)
        if not path.exists():
            raise _error(told)
        return _ran(_decoded(path.read_bytes()))


def suite(
    cases: str | Path | Sequence[Case],
    *,
    ranks: int | None = None,
    select: str = "",
    expect: Sequence[str] | None = None,
    out: str | Path | None = None,
    **keys: Any,
) -> list[Report]:
    """Run cases in as few launches as possible: those of a suite file, of a built-in suite by name, or a sequence.

    A sequence has its reports in its order, and `expect` is the expected ending of each (by default as its limit is
    safe or not): a report's `as_expected`. `keys` replace those of all cases; `select` is that of `distbench suite`.
    Cases that name other plugins than those before them are another launch. A case that ranks refuse is a report too.

    Raises:
        InvalidCase, Unsupported: a case is refused before any rank starts.
        Busy, LaunchFailed, DiskFull, ResultsLost: as `run`.
    """
    common = Case(**keys).keys
    if isinstance(cases, str | Path):
        with _folder(out) as folder:
            return _suite(str(cases), folder, ranks, common, [f"--select={select}"] if select else [])
    if select:
        message = f"select = {select!r:.80}: only of a suite by name or file; leave cases out of the sequence"
        raise InvalidCase(message)
    asked = [one.but(**common).keys for one in cases]
    if expect is not None and len(expect) != len(asked):
        message = f"expect: {counted(len(expect), 'ending')} for {counted(len(asked), 'case')}; give one for each"
        raise InvalidCase(message)
    launches: dict[str, dict[int, dict[str, Any]]] = {}
    endings: dict[str, list[str]] = {}
    for number, (one, ending) in enumerate(zip(asked, expect or [BY_LIMIT] * len(asked), strict=True)):
        known = endings.setdefault(repr(sorted(one.items())), [])  # equal cases of one launch have one expectation
        known += [ending] if ending not in known else []
        launch = f"{known.index(ending)} {_code(one)}"
        launches.setdefault(launch, {})[number] = one | {"expect": ending}
    found: dict[int, Report] = {}
    with _folder(out) as folder:
        for place, numbered in enumerate(launches.values()):
            found |= _sequence(numbered, folder / f"launch-{place}", ranks)
    return [found[number] for number in range(len(asked))]


def sweep(case: Case, *, limits: str = "auto", ranks: int | None = None, out: str | Path | None = None) -> list[Report]:
    """Run a case at many limits, without one first; see `distbench sweep`. The reports are in order of the limits.

    Raises:
        InvalidCase, Unsupported, Busy, LaunchFailed, DiskFull, ResultsLost: as `run`.
    """
    with _folder(out) as folder:
        told = _command("sweep", folder, ranks, case.keys, f"--limits={limits}")
        return _reports(folder, told)


def run_in_group(
    group: dist.ProcessGroup | None,
    case: Case,
    *,
    dispatch: Callable[[TokenBatch], Dispatched] | None = None,
    experts: Callable[[ExpertInput, ExpertWeights], Tensor] | None = None,
    combine: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Report:
    """Run a case on the ranks of a process group, each of which calls this; all of them get the report. Collective.

    `group` is None for the default group. `dispatch` takes this rank's rows, and returns those it received with their
    number; `combine` takes the expert rows and this rank's ids, and returns its tokens; `experts` takes the received
    rows after the cut, and the weights. Functions that are not given are distbench's own; dispatch and combine go
    together. A function that raises ends in its exception on its rank, and a function that stands still is the job's
    own to watch: there is no supervisor here.

    Raises:
        InvalidCase, Unsupported: on every rank; the case was not run.
        BrokenContract: on the rank where a function broke a rule (docs/plugins.md).
    """
    from distbench.launcher.in_group import report_of_group  # noqa: PLC0415 - loads torch
    from distbench.pipeline.in_group import Functions  # noqa: PLC0415 - as above

    report = report_of_group(group, case.keys, Functions(dispatch, experts, combine))
    return _ran(_decoded(report))


def _plain(key: str, value: Any) -> Any:
    """A value as a flag or a file could have it."""
    if key in KINDS and not isinstance(value, str):
        return _reference(key, value)
    if key in OPTION_KEYS and isinstance(value, Mapping):
        return ";".join(f"{name}={one}" for name, one in value.items())
    return list(value) if isinstance(value, tuple | range) else value


def _reference(key: str, factory: Any) -> str:
    """Name by which ranks import a factory; that of a script's own is the name of its file."""
    module, name = getattr(factory, "__module__", None), getattr(factory, "__qualname__", "<value>")
    if module == "__main__":
        spec, path = (getattr(sys.modules["__main__"], name, None) for name in ("__spec__", "__file__"))
        module = spec.name if spec else Path(path).stem if path else None
    if not module or "<" in name:
        message = (
            f"{key} = {factory!r:.80}: no rank can import it; define it at the top of a file, or name it as "
            "package.module:name"
        )
        raise InvalidCase(message)
    return f"{module}:{name}"


def _code(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Keys that only flags may give, and those that go with them."""
    return {key: value for key, value in keys.items() if names_code(key, value) or (key in OPTION_KEYS and value)}


def _flags(keys: Mapping[str, Any]) -> Iterator[str]:
    for key, value in keys.items():
        flag = f"--{key.replace('_', '-')}"
        if FIELD_HINTS[key].__origin__ is bool or isinstance(value, bool):
            yield flag if value else flag.replace("--", "--no-", 1)
        elif isinstance(value, list):
            yield f"{flag}={','.join(map(str, value))}"
        else:
            yield f"{flag}={value}"


def _command(command: str, out: Path, ranks: int | None, keys: Mapping[str, Any], *others: str) -> str:
    """Run a command of distbench to its end; return what it said on standard error."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        message = f"{command}: this process is a rank of torchrun; use run_in_group, or start without torchrun"
        raise InvalidCase(message)
    given = dict(keys)
    asked = given.pop("ep_size", None)
    ranks = ranks or asked
    counted = [f"--nproc={ranks}"] if ranks else []
    path = os.pathsep.join(dict.fromkeys(filter(None, sys.path)))  # plugins are found as they are found here
    done = subprocess.run(  # noqa: S603 - its own interpreter
        [sys.executable, "-m", "distbench", command, *others, f"--out={out}", *counted, *_flags(given)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
        env=os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"},  # nor does -m add the working directory
    )
    if done.returncode < 0:
        message = f"distbench {command} was ended by signal {-done.returncode}; call it again"
        raise LaunchFailed(message)
    return done.stderr


def _suite(
    name: str, out: Path, ranks: int | None, keys: Mapping[str, Any], others: Sequence[str] = ()
) -> list[Report]:
    return _reports(out, _command("suite", out, ranks, keys, name, "--quiet", *others))


def _sequence(cases: Mapping[int, Mapping[str, Any]], out: Path, ranks: int | None) -> dict[int, Report]:
    """Reports of cases that name the same code, by their numbers."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "cases.json"
    code = _code(next(iter(cases.values())))
    included = [
        {key: value for key, value in keys.items() if key not in code} | {"name": str(number)}
        for number, keys in cases.items()
    ]
    path.write_bytes(msgspec.json.encode({"name": "cases", "include": included}))
    known = load_suite(str(path), ranks or _DEFAULT_RANKS, [Layer(FLAGS, code)], reader(os.environ))
    lost = f"--max-faults={len(cases) + 1}"  # each case is to have its report, however many lose their ranks
    reports = {report.name: report for report in _suite(str(path), out, ranks, code, [lost])}
    first = dict(known.merged)
    return {number: reports[first.get(str(number), str(number))] for number in cases}


def _reports(out: Path, told: str) -> list[Report]:
    """Reports of a folder, which may be resumed: an error of the command counts, whatever the folder holds."""
    if _ENDING.search(told) or not (out / "results.jsonl").exists():
        raise _error(told)
    found = [_decoded(msgspec.json.encode(report)) for report in read_reports(out)]
    if not found:
        raise _error(told)
    summary = Results(out).summary
    if summary is not None and summary.finished < summary.cases:
        why = summary.stopped or "the command ended early"
        ended = f"{summary.finished} of {counted(summary.cases, 'case')} with a result"
        message = f"{ended}: {why}; the same call, with `out`, resumes"
        raise LaunchFailed(message)
    return found


def _decoded(content: bytes) -> Report:
    return msgspec.json.decode(content, type=Report)


def _ran(report: Report) -> Report:
    """The report of a case that was run; that of another one is raised."""
    if report.verdict in _REFUSED:
        raise _REFUSED[report.verdict](report.reasons[0].message)
    return report


def _error(told: str) -> DistbenchError:
    """The error that a command ended in, by its last line on standard error."""
    endings = _ENDING.findall(told)
    label, message = endings[-1] if endings else ("", f"distbench ended without a report: {told[-_TOLD_CHARACTERS:]}")
    kind: type[DistbenchError] = _ERRORS.get(label, DistbenchError)
    error = kind.__new__(kind, message)  # some kinds add to their message, which this one has already
    error.args = (message,)
    return error


@contextmanager
def _folder(out: str | Path | None) -> Iterator[Path]:
    if out is not None:
        yield Path(out)
        return
    with tempfile.TemporaryDirectory(prefix="distbench-") as folder:
        yield Path(folder)
