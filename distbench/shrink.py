"""The smallest case that fails in the same way: first up from the smallest, then down in each dimension by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from distbench.case import Case
from distbench.errors import InvalidCase, Verdict
from distbench.report.document import Report
from distbench.trials import Lab, Signature, possible, signature, varied
from distbench.workload.kinds import parse_routing

Changes = dict[str, Any]

_SEEDS = 4
_FEW_TOKENS = 64
_LOST = (Verdict.HANG, Verdict.RANK_FAULT)
_HANG_S = 10.0
_SMALLEST = {"hidden_size": 128, "intermediate_size": 128, "topk": 2, "max_dispatch_tokens_per_rank": 32}
_LEAST = {"topk": 1, "hidden_size": 8, "intermediate_size": 1, "max_dispatch_tokens_per_rank": 1, "repeats": 1}


class Step(msgspec.Struct, frozen=True):
    """A case on the way down, and what had been spent until then."""

    what: str
    case: Case
    cases: int
    launches: int


class Shrunk(msgspec.Struct, frozen=True, kw_only=True):
    """How the case failed, all the way down, and the smallest case with its report."""

    same: Signature
    case: Case
    report: Report


def shrink(lab: Lab, case: Case, tell: Callable[[Step], None]) -> Shrunk:
    """Make a failing case small, as long as verdict, first wrong stage and surest cause stay the same.

    `tell` hears of every smaller case. First come cases far smaller than the given one, growing until one fails: a
    large case costs what hundreds of small ones do. Then each dimension is lowered on its own, and what can be lowered
    together is, until nothing can.

    Raises:
        InvalidCase: the case does not fail here.

    """
    first = lab.run([case])[0]
    same = signature(first)
    if not first.exit_code:
        message = f"the case does not fail here: {same}; give one that does"
        raise InvalidCase(message)

    def fails_the_same(report: Report) -> bool:
        return signature(report) == same

    def take(what: str, found: Case) -> Case:
        tell(Step(what, found, lab.cases, lab.launches))
        return found

    if same.verdict is Verdict.HANG:
        case = varied(case, timeout=min(case.timeout, _HANG_S), stage_timeouts="")
    limits = _limits(case, first)
    current = take("as given", case)
    for level in range(_levels(case)):
        grown = lab.first(_small(case, level, limits), fails_the_same)
        if grown is not None:
            current = take("up from the smallest", grown)
            break
    while True:
        lower = _lowered(lab, current, limits, fails_the_same, together=same.verdict not in _LOST)
        if lower is None:
            return Shrunk(same=same, case=current, report=lab.run([current])[0])
        current = take("lowered", lower)


def _levels(case: Case) -> int:
    """Return how many times all dimensions can be raised until they are those of `case`."""
    largest = max(case.ep_size, case.hidden_size // 128, case.intermediate_size // 128, case.experts_per_rank)
    return max(largest.bit_length(), (max(case.tokens).bit_length() + 1) // 2)


def _small(case: Case, level: int, limits: Sequence[str]) -> list[Case]:
    """Return cases with every dimension at 2 to the `level` times the smallest worth a try (tokens: 4 to the), at most.

    On the first two levels other seeds are tried too: what damages some tokens only may miss the few that are left.
    """
    sizes = {key: min(getattr(case, key), least << level) for key, least in _SMALLEST.items()}
    ranks, tokens = min(case.ep_size, 2 << level), 2 << 2 * level
    sizes["max_dispatch_tokens_per_rank"] = min(case.max_dispatch_tokens_per_rank, max(32, tokens))
    local = min(case.experts_per_rank, max(2 << level, -(-sizes["topk"] // ranks)))
    seeds = range(case.seed, case.seed + (_SEEDS if level < 2 else 1))  # noqa: PLR2004 - as said above
    shape = sizes | {"num_experts": local * ranks}
    return [
        one
        for seed in seeds
        for limit in limits
        for one in possible(case, **shape, **_on_ranks(case, ranks, tokens), seed=seed, limit=limit)
    ]


def _on_ranks(case: Case, ranks: int, tokens: int) -> Changes:
    """Return what has to change for the first `ranks` ranks alone, none with more than `tokens` tokens."""
    routing = parse_routing(case.routing)
    if routing.kind in ("hot-rank", "fan-in"):
        routing = msgspec.structs.replace(routing, parameter=int(routing.parameter) % ranks)
    return {
        "ep_size": ranks,
        "tokens": tuple(min(count, tokens) for count in case.tokens[:ranks]),
        "routing": str(routing),
    }


def _limits(case: Case, report: Report) -> list[str]:
    """Return the limit, and limits as far from the rows received, for cases that receive fewer."""
    found = [case.limit]
    if report.limit is not None and report.limit.effective is not None and not report.limit.safe:
        found += [f"max-recv-{report.limit.max_recv - report.limit.effective}", "max-recv-1"]
    elif case.limit.isdigit():
        found += ["max-recv", "sum32"]
    return list(dict.fromkeys(found))


def _lowered(
    lab: Lab, case: Case, limits: Sequence[str], same: Callable[[Report], bool], *, together: bool
) -> Case | None:
    """Return the case with all dimensions lowered that can be, or as many of them as fail the same together.

    `together` runs the candidates of all dimensions in one launch; where each that fails costs a launch, they go one
    dimension at a time, smallest first, up to the first that fails.
    """
    dimensions = [
        [(changes, one) for changes in ladder for one in possible(case, **changes)] for ladder in _ladders(case, limits)
    ]
    if together:
        lab.run([one for candidates in dimensions for _, one in candidates])
    wins: list[Changes] = []
    for candidates in dimensions:
        found = lab.first([one for _, one in candidates], same)
        wins += [changes for changes, one in candidates if one == found][:1]
    merged = [_merged(wins[:count]) for count in range(len(wins), 0, -1)]
    return lab.first([one for changes in merged for one in possible(case, **changes)], same)


def _merged(wins: Sequence[Changes]) -> Changes:
    """Return all changes in one; the first that speaks of a key has its way, but the tokens are cut by all."""
    found: Changes = {}
    for changes in wins:
        found = changes | found
    return found


def _ladders(case: Case, limits: Sequence[str]) -> Iterator[list[Changes]]:
    """Yield, for each dimension, changes that lower it, the lowest first."""
    yield list(_fewer_ranks(case, limits))
    yield list(_fewer_tokens(case, limits))
    yield [{"num_experts": local * case.ep_size} for local in _below(case.experts_per_rank, 1)]
    for key, least in _LEAST.items():
        yield [{key: value} for value in _below(getattr(case, key), least)]
    if case.routing != "uniform":
        yield [{"routing": "uniform"}]


def _fewer_ranks(case: Case, limits: Sequence[str]) -> Iterator[Changes]:
    """Yield fewer ranks, with their own tokens and, where there are few, with those of all."""
    total = sum(case.tokens)
    for ranks in _below(case.ep_size, 1):
        held = _on_ranks(case, ranks, max(case.tokens)) | {"num_experts": case.experts_per_rank * ranks}
        spread = tuple((total + place) // ranks for place in range(ranks))
        for tokens in dict.fromkeys((held["tokens"], spread if total <= _FEW_TOKENS else held["tokens"])):
            yield from (held | {"tokens": tokens, "limit": limit} for limit in limits)


def _fewer_tokens(case: Case, limits: Sequence[str]) -> Iterator[Changes]:
    """Yield fewer tokens on all ranks, then on one rank at a time; with other seeds too where there are few."""
    lowered = [tuple(min(count, most) for count in case.tokens) for most in _below(max(case.tokens), 1)]
    if sum(case.tokens) <= _FEW_TOKENS:
        lowered += [
            (*case.tokens[:rank], fewer, *case.tokens[rank + 1 :])
            for rank, count in enumerate(case.tokens)
            for fewer in _below(count, 0)
        ]
    lowered.sort(key=sum)
    for tokens in dict.fromkeys(lowered):
        seeds = _SEEDS if sum(tokens) <= _FEW_TOKENS else 1
        for seed in range(case.seed, case.seed + seeds):
            yield from ({"tokens": tokens, "seed": seed, "limit": limit} for limit in limits)


def _below(value: int, least: int) -> list[int]:
    """Return numbers below `value`, from `least` up: it, then those that each take half of the way left, value - 1."""
    found, step = [], value - least
    while step > 0:
        found.append(value - step)
        step //= 2
    return found
