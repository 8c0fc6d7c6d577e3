"""Two sets of results, case by case: new failures, absent results, and slowdowns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, Protocol

import msgspec

from distbench.case.presets import DIMENSIONS
from distbench.case.spec import FIELD_DEFAULTS
from distbench.case.stages import Arm
from distbench.errors import InvalidCase, Verdict
from distbench.report.results import Result
from distbench.tools.compare.environment import EnvironmentFinding, Surroundings
from distbench.tools.compare.launches import LEAST_LAUNCHES, judge_launches
from distbench.tools.compare.noise import (
    ALPHA,
    LEAST_SAMPLES,
    Change,
    Pair,
    Samples,
    judge_change,
    median_of,
    readable,
    summed_error,
)

SCHEMA = "distbench.compare/1"
ALL_CASES = ""

Key = tuple[str, str]
_Samples = dict[Key, tuple[Samples, ...]]
Kind = Literal[
    "regressed", "new failure", "absent", "another case", "time absent", "no result", "fixed", "still failing"
]

Detect = float | Literal["auto", "off"]

DEVICE_DETECT = 0.1
"""Slowdown that must be detectable in every arm and stage where a device was timed, unless --detect says otherwise."""

# An arm and stage in which not even a tenfold slowdown would have been detected is not judged.
_BLIND = 9.0
# Growth of times on a device, and on a host where ranks wait for cores, that never passes, even if noise explains it.
_GROSS_ON_DEVICE, _GROSS_ON_HOST = 1.0, 4.0

Noise = Literal["within launches", "between launches"]

_SEVERITY = tuple(Verdict)
_REGRESSIONS = ("regressed", "new failure", "absent", "another case", "time absent")
_DEFAULTS = msgspec.to_builtins(FIELD_DEFAULTS)
_UNKNOWN = object()
_UNSUPPORTED = Verdict.UNSUPPORTED.exit_code
_NO_RESULT = {Verdict.INVALID, Verdict.UNSUPPORTED, Verdict.HANG, Verdict.RANK_FAULT}
# Without --iterations it runs once: the others are compared against it.
_RUN_ONCE = Arm.PADDED


class CaseFinding(msgspec.Struct, frozen=True, kw_only=True):
    """A case whose result differs from before; verdicts are empty where there is no result."""

    kind: Kind
    name: str
    old: str = ""
    new: str = ""
    message: str = ""


class TimeFinding(msgspec.Struct, frozen=True, kw_only=True):
    """Change of a stage's time in one case, or in all of them together (ALL_CASES).

    `old_us` and `new_us` are medians in microseconds, summed over the `cases` cases; `old_error_us` and `new_error_us`
    half the widths of their 95 % confidence intervals within launches, None where a case has too few samples.
    """

    arm: str
    stage: str
    case: str
    change: Change
    old_us: float
    new_us: float
    cases: int
    old_error_us: float | None = None
    new_error_us: float | None = None

    def suspect(self, gross: float) -> bool:
        """Whether the time has grown by the share `gross` or more without being called slower."""
        return self.change.change >= gross and not self.change.slower


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """`distbench.compare/1`. `unjudged` are arms and stages with too few samples or too much noise for any change.

    `times` has every arm and stage over all cases, then the single cases that are slower or faster. `noise` is the kind
    of noise they were judged by, over `launches` old launches. `left_out` counts, by arm and stage, the cases with too
    few samples to be judged. `coarse` are the arms and stages in which a slowdown of `detect` would not have been
    detected; None requires none. `suspect` are times that grew grossly without being called slower. `environment` holds
    the differences between OLD and NEW. `untimed`: times were requested and none could be compared.
    """

    schema: str = SCHEMA
    pairs: int
    launches: int
    noise: Noise
    environment: list[EnvironmentFinding]
    cases: list[CaseFinding]
    times: list[TimeFinding]
    unjudged: list[Key]
    left_out: dict[str, int]
    detect: float | None
    coarse: list[Key]
    suspect: list[tuple[str, str, str]]
    untimed: bool
    exit_code: int


class _Kept(msgspec.Struct, frozen=True):
    """The parts of a result that a comparison keeps; `times` has the samples of each launch in it, where kept."""

    name: str
    hash: str
    case: dict[str, Any]
    verdict: Verdict
    as_expected: bool
    message: str
    times: _Samples
    on_device: bool


class _Timed(msgspec.Struct, frozen=True):
    case: str
    pair: Pair


class _Times:
    """Samples of all cases that ended as before, by arm and stage, and those that could not be used."""

    def __init__(self, launches: int, *, asked: bool) -> None:
        self.asked = asked
        self.on_device = False
        self.timed: dict[Key, list[_Timed]] = {}
        self.stages: set[Key] = set()
        self.left_out: Counter[str] = Counter()
        self._launches = launches

    def take(self, old: _Kept, new: _Kept) -> list[CaseFinding]:
        """Add the samples that both have; return findings where only the old result has them, or enough of them."""
        self.stages |= old.times.keys()
        self.on_device |= old.on_device or new.on_device
        for key in (key for key in old.times if key in new.times):
            series = (*old.times[key], *new.times[key])
            if len(series) == self._launches + 1 and min(one.size for one in series) >= LEAST_SAMPLES:
                self.timed.setdefault(key, []).append(_Timed(new.name, Pair(series[:-1], series[-1])))
            else:
                self.left_out["/".join(key)] += 1
        message = _gone(old.times, new.times)
        if not message:
            return []
        verdicts = {"old": old.verdict.value, "new": new.verdict.value}
        return [CaseFinding(kind="time absent", name=new.name, message=message, **verdicts)]


def _gone(old: _Samples, new: _Samples) -> str:
    """Times or samples of `old` that `new` lacks, in words."""
    absent = [key for key, before in old.items() if key not in new or (before and not new[key])]
    thin = [
        key for key, before in old.items() if key not in absent and _most(before) >= LEAST_SAMPLES > _most(new[key])
    ]
    told = (("no longer any time of", absent), (f"fewer than {LEAST_SAMPLES} samples now of", thin))
    return "; ".join(f"{what} {', '.join(map('/'.join, keys))}" for what, keys in told if keys)


def _most(launches: tuple[Samples, ...]) -> int:
    return max((one.size for one in launches), default=0)


def compare(
    old: Sequence[Iterable[Result]], new: Iterable[Result], *, times: bool = True, detect: Detect = "auto"
) -> Comparison:
    """Compare `new` with the launches `old`; without `times`, verdicts only.

    A slowdown of `detect`, a share, has to be one that would be found in every arm and stage; "auto" is DEVICE_DETECT
    where a device was timed, else off.

    Raises:
        InvalidCase: they have no case in common, results that cannot be read, or two old launches.

    """
    if 1 < len(old) < LEAST_LAUNCHES:
        message = (
            f"compare: {len(old)} old launches do not tell how far launches lie apart; give one, or at least "
            f"{LEAST_LAUNCHES}"
        )
        raise InvalidCase(message)
    findings: list[CaseFinding] = []
    taken = _Times(len(old), asked=times)
    pairs = 0
    then, now = Surroundings(), Surroundings()
    before_all = _merged([[_kept(result, then) for result in launch] for launch in old])
    for before, after in _pairs(before_all, [_kept(result, now) for result in new]):
        pairs += before is not None and after is not None
        finding = _finding(before, after)
        if finding is not None:
            findings.append(finding)
        elif taken.asked and before is not None and after is not None:
            findings += taken.take(before, after)
    if not pairs:
        message = "compare: the two have no case in common; give results of the same suite"
        raise InvalidCase(message)
    share = (DEVICE_DETECT if taken.on_device else None) if detect == "auto" else detect
    return _concluded(pairs, findings, taken, len(old), None if share == "off" else share, then.against(now))


def _concluded(  # noqa: PLR0913 - what was found, and what was asked
    pairs: int,
    findings: list[CaseFinding],
    taken: _Times,
    launches: int,
    detect: float | None,
    environment: list[EnvironmentFinding],
) -> Comparison:
    gross = _GROSS_ON_DEVICE if taken.on_device else _GROSS_ON_HOST
    changes = _judge(taken.timed, launches, gross)
    together = {(found.arm, found.stage): found.change.detectable for found in changes if found.case == ALL_CASES}
    judged = {key for key, detectable in together.items() if detectable is not None and detectable < _BLIND}
    unjudged = sorted(taken.stages - judged)
    coarse = [] if detect is None else sorted(key for key in judged if (together[key] or 0) > detect)
    untimed = taken.asked and not taken.timed
    excused = {key for key in unjudged if detect is None and key[0] == _RUN_ONCE and key not in taken.timed}
    suspect = [(found.arm, found.stage, found.case) for found in changes if found.suspect(gross)]
    unanswered = untimed or bool(coarse) or bool(suspect) or bool(set(unjudged) - excused)
    return Comparison(
        pairs=pairs,
        launches=launches,
        noise="within launches" if launches == 1 else "between launches",
        environment=environment,
        cases=findings,
        times=changes,
        unjudged=unjudged,
        left_out={name: taken.left_out[name] for name in map("/".join, sorted(taken.timed)) if taken.left_out[name]},
        detect=detect,
        coarse=coarse,
        suspect=suspect,
        untimed=untimed,
        exit_code=_exit_code(findings, changes, unanswered=unanswered),
    )


def _kept(result: Result, surroundings: Surroundings) -> _Kept:
    surroundings.take(result.environment)
    times: _Samples = {}
    timed = result.timed_arms
    try:
        for time in result.stage_times():
            if not timed or time.arm in timed:  # with timed iterations, a pass that checks bits is no measurement
                times[time.arm, time.stage] = (readable(time.samples_us),) if time.samples_us else ()
    except ValueError as error:
        message = f"case {result.name}: {error}; run it again"
        raise InvalidCase(message) from error
    message = result.reasons[0].message if result.reasons else ""
    return _Kept(
        name=result.name,
        hash=result.hash,
        case=result.case,
        verdict=result.verdict,
        as_expected=result.as_expected,
        message=message,
        times=times,
        on_device=result.timed_on_device,
    )


def _merged(launches: list[list[_Kept]]) -> list[_Kept]:
    """One result for each case of several launches: the best, with the times of all with the same ending."""
    if len(launches) == 1:
        return launches[0]
    cases: dict[str, list[_Kept]] = {}
    for one in (one for launch in launches for one in launch):
        cases.setdefault(one.hash, []).append(one)
    return [_merged_case(results) for results in cases.values()]


def _merged_case(results: list[_Kept]) -> _Kept:
    best = max(results, key=lambda one: (one.as_expected, _SEVERITY.index(one.verdict)))
    alike = [one for one in results if one.verdict is best.verdict]
    keys = dict.fromkeys(key for one in alike for key in one.times)
    times = {key: tuple(series for one in alike for series in one.times.get(key, ())) for key in keys}
    return msgspec.structs.replace(best, times=times)


def _pairs(old: list[_Kept], new: list[_Kept]) -> Iterator[tuple[_Kept | None, _Kept | None]]:
    """Pair results by the hash of their case, then by names unique on each side; the rest stay unpaired."""
    by_hash = {one.hash: one for one in new}
    rest_old = [one for one in old if one.hash not in by_hash]
    yield from ((one, by_hash[one.hash]) for one in old if one.hash in by_hash)
    known = {one.hash for one in old}
    rest_new = [one for one in new if one.hash not in known]
    names = Counter(one.name for one in rest_old)
    by_name = {one.name: one for one in rest_new}
    doubles = {name for name, count in Counter(one.name for one in rest_new).items() if count > 1}
    met = set()
    for one in rest_old:
        if names[one.name] == 1 and one.name in by_name and one.name not in doubles:
            met.add(one.name)
            yield one, by_name[one.name]
        else:
            yield one, None
    yield from ((None, one) for one in rest_new if one.name not in met)


def _finding(old: _Kept | None, new: _Kept | None) -> CaseFinding | None:
    if new is None:
        assert old is not None  # noqa: S101 - a pair has one side at least
        return CaseFinding(kind="absent", name=old.name, old=old.verdict.value, message="no longer any result")
    if old is None:
        if new.as_expected:
            return None
        return CaseFinding(kind="new failure", name=new.name, new=new.verdict.value, message=new.message)
    keys = (old.case.keys() | new.case.keys()) - {"hash"}
    if all(key in one.case for key in DIMENSIONS for one in (old, new)):
        keys -= {"model"}  # a label of the dimensions; before there was "custom", also where they were overridden
    other = sorted(key for key in keys if _value(old, key) != _value(new, key))
    kind: Kind | None = "another case" if other else kind_of(old, new)
    if kind is None:
        return None
    message = f"not the same {', '.join(other)}" if other else new.message
    return CaseFinding(kind=kind, name=new.name, old=old.verdict.value, new=new.verdict.value, message=message)


def _value(one: _Kept, key: str) -> Any:
    """Value of a case's key; a key unknown to an older distbench has today's default."""
    return one.case[key] if key in one.case else _DEFAULTS.get(key, _UNKNOWN)


class Ending(Protocol):
    """How a case ended."""

    @property
    def verdict(self) -> Verdict:
        """The verdict of its report."""

    @property
    def as_expected(self) -> bool:
        """Whether that was expected."""


def kind_of(old: Ending, new: Ending) -> Kind | None:
    """Kind of the change between two endings of one case; None where both are as expected."""
    worse = _SEVERITY.index(new.verdict) < _SEVERITY.index(old.verdict)
    if new.as_expected:
        if old.verdict is Verdict.PASS and new.verdict is not Verdict.PASS:
            return "regressed"
        return None if old.as_expected else "fixed"
    if old.as_expected or worse:
        return "regressed"
    return "no result" if {old.verdict, new.verdict} <= _NO_RESULT else "still failing"


def _judge(timed: dict[Key, list[_Timed]], launches: int, gross: float) -> list[TimeFinding]:
    """Judge each arm's stages over all cases and in each; half of ALPHA is shared by the first, half by the others.

    Of single cases those are returned that changed, or whose time has grown by `gross` or more.
    """
    if not timed:
        return []
    judge = judge_change if launches == 1 else judge_launches
    together = ALPHA / 2 / len(timed)
    alone = ALPHA / 2 / sum(map(len, timed.values()))
    changes = [
        _timed(key, ALL_CASES, [one.pair for one in cases], judge([one.pair for one in cases], together))
        for key, cases in timed.items()
    ]
    for key, cases in timed.items():
        for one in cases if len(cases) > 1 else ():
            found = _timed(key, one.case, [one.pair], judge([one.pair], alone))
            if found.change.slower or found.change.faster or found.suspect(gross):
                changes.append(found)
    return changes


def _timed(key: Key, case: str, pairs: Sequence[Pair], change: Change) -> TimeFinding:
    return TimeFinding(
        arm=key[0],
        stage=key[1],
        case=case,
        change=change,
        old_us=sum(median_of(pair.before) for pair in pairs),
        new_us=sum(median_of(pair.new) for pair in pairs),
        cases=len(pairs),
        old_error_us=summed_error([pair.before for pair in pairs]),
        new_error_us=summed_error([pair.new for pair in pairs]),
    )


def _exit_code(findings: list[CaseFinding], changes: list[TimeFinding], *, unanswered: bool) -> int:
    if any(found.kind in _REGRESSIONS for found in findings) or any(found.change.slower for found in changes):
        return 1
    return _UNSUPPORTED if unanswered or any(found.kind == "no result" for found in findings) else 0
