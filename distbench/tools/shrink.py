"""The smallest case with the same failure: first upwards from the smallest, then down one dimension at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import Any, NoReturn

import msgspec

from distbench.case.injection import Injection, parse_inject
from distbench.case.spec import Case
from distbench.errors import InvalidCase, Verdict
from distbench.report.schema import Report
from distbench.tools.lab import Lab, Signature, impatient, possible, signature
from distbench.workload.routing_spec import parse_routing

Changes = dict[str, Any]

Ladder = Callable[[Case, Sequence[str]], Iterator[Changes]]
"""Changes that lower one dimension of a case, the lowest first; limits follow changes of the rows received."""

_SEEDS = 4
_FEW_TOKENS = 64
_MOST_LEVELS = 24
_COSTLY = 1 << 28


class Step(msgspec.Struct, frozen=True):
    """A smaller case that still fails, and the cases and launches spent so far."""

    what: str
    case: Case
    cases: int
    launches: int


class Shrunk(msgspec.Struct, frozen=True, kw_only=True):
    """The failure's signature, and the smallest case that has it, with its report."""

    same: Signature
    case: Case
    report: Report


def shrink(lab: Lab, case: Case, tell: Callable[[Step], None], known: Report | None = None) -> Shrunk:
    """Reduce a failing case while verdict, first wrong stage and most certain cause stay the same.

    `tell` receives every smaller case. `known` is a report of the case, which then need not run unchanged. Cases far
    smaller than the given one run first, growing until one fails: a large case costs as much as hundreds of small ones.
    Then one dimension after another is lowered, until none can be. This takes one launch, and another for each
    candidate that loses its ranks.

    Raises:
        InvalidCase: the case does not fail here, or not as its report says.

    """
    first = lab.run([case])[0] if known is None else known
    same = signature(first)
    if not first.exit_code:
        _refuse(same)

    def fails_the_same(report: Report) -> bool:
        return signature(report) == same

    def take(what: str, found: Case) -> Case:
        tell(Step(what, found, lab.cases, lab.launches))
        return found

    if same.verdict is Verdict.HANG:
        case = impatient(case)
    limits = _limits(case, first)
    take("as given", case)
    grown = (lab.first(candidates, fails_the_same) for candidates in _growing(case, limits))
    current = next((found for found in grown if found is not None), None) or lab.first([case], fails_the_same)
    if current is None:
        _refuse(signature(lab.run([case])[0]), same)
    take("up from the smallest", current)
    while True:
        lower = _lowered(lab, current, limits, fails_the_same)
        if lower is None:
            return Shrunk(same=same, case=current, report=lab.run([current])[0])
        current = take("lowered", lower)


def _refuse(here: Signature, recorded: Signature | None = None) -> NoReturn:
    there = "" if recorded is None else f", its report says {recorded}"
    message = f"the case does not fail here{' in that way' if there else ''}: {here}{there}; give one that does"
    raise InvalidCase(message)


def _growing(case: Case, limits: Sequence[str]) -> Iterator[list[Case]]:
    """Yield ever larger candidates: all dimensions small, then one of them as given, then all twice as large, …"""
    smallest = _sizes(case, 0)
    yield _candidates(case, [smallest], limits, _SEEDS)
    given = _sizes(case, _MOST_LEVELS)
    yield _candidates(
        case, [smallest | {key: given[key]} for key in smallest if smallest[key] != given[key]], limits, 2
    )
    for level in range(1, _MOST_LEVELS):
        sizes = _sizes(case, level)
        if sizes == given:
            return
        yield _candidates(case, [sizes], limits, 1)


def _sizes(case: Case, level: int) -> dict[str, int]:
    """Each dimension at 2^`level` times the smallest useful value (tokens: 4^`level`), at most as given."""
    tokens = 2 << 2 * level
    return {
        "ep_size": min(case.ep_size, 2 << level),
        "tokens": min(max(case.tokens), tokens),
        "experts_per_rank": min(_local(case), 2 << level),
        "topk": min(case.topk, 2 << level),
        "hidden_size": min(case.hidden_size, 128 << level),
        "intermediate_size": min(case.intermediate_size, 128 << level),
        "max_dispatch_tokens_per_rank": min(case.max_dispatch_tokens_per_rank, max(32, tokens)),
    }


def _candidates(case: Case, shapes: list[dict[str, int]], limits: Sequence[str], seeds: int) -> list[Case]:
    """Valid cases in those shapes, also with other seeds: a few tokens may miss the failure."""
    found = []
    for seed in range(case.seed, case.seed + seeds):
        for sizes in shapes:
            ranks, tokens = sizes["ep_size"], sizes["tokens"]
            shape = {key: size for key, size in sizes.items() if key not in ("ep_size", "tokens", "experts_per_rank")}
            experts = max(sizes["experts_per_rank"], -(-sizes["topk"] // ranks)) * ranks
            shape |= _with_experts(case, experts, ranks)
            shape["max_dispatch_tokens_per_rank"] = max(shape["max_dispatch_tokens_per_rank"], tokens)
            for limit in limits:
                found += possible(case, **shape, **_on_ranks(case, ranks, tokens), seed=seed, limit=limit)
    return found


def _on_ranks(case: Case, ranks: int, tokens: int) -> Changes:
    """Changes that leave only the first `ranks` ranks, none with more than `tokens` tokens."""
    routing = parse_routing(case.routing)
    if routing.kind in ("hot-rank", "fan-in"):
        routing = msgspec.structs.replace(routing, parameter=int(routing.parameter) % ranks)
    return {
        "ep_size": ranks,
        "tokens": tuple(min(count, tokens) for count in case.tokens[:ranks]),
        "prealloc_max_recv_tokens": -(-case.prealloc_max_recv_tokens // case.ep_size) * ranks,
        "routing": str(routing),
        "inject": ";".join(_placed(fault, ranks) for fault in parse_inject(case.inject)),
    }


def _placed(fault: Injection, ranks: int) -> str:
    """An injected fault; one on a removed rank moves to the last remaining rank: it stands for any one rank."""
    options = dict(fault.options)
    if options.get("rank", "").isdigit():
        options["rank"] = str(min(int(options["rank"]), ranks - 1))
    return fault.name + ":" * bool(options) + ",".join(f"{key}={value}" for key, value in options.items())


def _limits(case: Case, report: Report) -> list[str]:
    """The limit, and limits at the same distance from the rows received, for cases that receive fewer rows."""
    found = [case.limit]
    if report.limit is not None and report.limit.effective is not None and not report.limit.safe:
        found += [f"max-recv-{report.limit.max_recv - report.limit.effective}", "max-recv-1"]
    elif case.limit.isdigit():
        found += ["max-recv", "sum32"]
    return list(dict.fromkeys(found))


def _lowered(lab: Lab, case: Case, limits: Sequence[str], same: Callable[[Report], bool]) -> Case | None:
    """The case with each dimension in turn as low as it still fails the same, or None.

    Where each case takes seconds, only the lowest value and the middle one are tried.
    """
    current = case
    for ladder in _LADDERS:
        steps = list(ladder(current, limits))
        if _work(current) > _COSTLY:
            steps = [*steps[:1], *steps[len(steps) // 2 :][:1]]
        found = lab.first([one for changes in steps for one in possible(current, **changes)], same)
        current = found or current
    return None if current == case else current


def _work(case: Case) -> int:
    """Work of a case: weights generated and routed rows multiplied, in elements."""
    return (case.num_experts + sum(case.tokens)) * case.hidden_size * case.intermediate_size


def _fewer_ranks(case: Case, limits: Sequence[str]) -> Iterator[Changes]:
    """Yield fewer ranks, with their own tokens and, where there are few, with those of all."""
    total = sum(case.tokens)
    for ranks in _below(case.ep_size, 1):
        held = _on_ranks(case, ranks, max(case.tokens)) | _with_experts(case, _experts(case, ranks), ranks)
        spread = tuple((total + place) // ranks for place in range(ranks))
        for tokens in dict.fromkeys((held["tokens"], spread if total <= _FEW_TOKENS else held["tokens"])):
            yield from (held | {"tokens": tokens, "limit": limit} for limit in limits)


def _experts(case: Case, ranks: int) -> int:
    """Experts for fewer ranks: as many per rank as the case has, or as its top-k needs."""
    return max(_local(case), -(-case.topk // ranks)) * ranks


def _local(case: Case) -> int:
    """Routed experts for each rank, at least one."""
    return max(case.num_experts // case.ep_size, 1)


def _with_experts(case: Case, experts: int, ranks: int) -> Changes:
    """Changes to another number of experts, with as many replicas of each as the case has on average."""
    slots = -(-experts * case.physical_experts // (case.num_experts * ranks)) * ranks
    return {"num_experts": experts, "physical_experts": slots, "placement": ()}


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


def _fewer_experts(case: Case, _: Sequence[str]) -> Iterator[Changes]:
    for local in _below(_local(case), 1):
        yield _with_experts(case, local * case.ep_size, case.ep_size)


def _lower(key: str, least: int) -> Ladder:
    return lambda case, _: ({key: value} for value in _below(getattr(case, key), least))


def _plainer_slots(case: Case, _: Sequence[str]) -> Iterator[Changes]:
    plain: tuple[Changes, ...] = (
        {"physical_experts": 0, "placement": ()},
        {"placement": ()},
        {"shared_experts": 0},
        {"dropped_slots": 0.0},
        {"dropped_tokens": 0.0},
    )
    yield from (one for one in plain if any(getattr(case, key) != value for key, value in one.items()))


def _plainer_routing(case: Case, _: Sequence[str]) -> Iterator[Changes]:
    if case.routing != "uniform":
        yield {"routing": "uniform"}


def _below(value: int, least: int) -> list[int]:
    """Numbers from `least` up to `value` - 1, lowest first: its doublings, and halves of the way to `value`."""
    found, step = set(), value - least
    while step > 0:
        found.add(value - step)
        step //= 2
    doubles = takewhile(lambda number: number < value, (max(least, 1) << power for power in range(25)))
    return sorted(found | set(doubles))


_LADDERS: tuple[Ladder, ...] = (
    _fewer_ranks,
    _fewer_tokens,
    _fewer_experts,
    _lower("topk", 1),
    _lower("hidden_size", 8),
    _lower("intermediate_size", 1),
    _lower("max_dispatch_tokens_per_rank", 1),
    _lower("prealloc_max_recv_tokens", 0),
    _lower("repeats", 1),
    _plainer_routing,
    _plainer_slots,
)
