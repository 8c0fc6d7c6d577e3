"""The cases of a self-test: every fault on random ranks, in random arms, and random cases without one."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import msgspec

from distbench.errors import Verdict
from distbench.faults.base import Fault
from distbench.faults.injector import FAULTS
from distbench.job import Entry
from distbench.resolve import Layer, resolve_case

SEVERAL = "several faults at once"
CLEAN = "clean"
DEAD = (Verdict.HANG.value, Verdict.RANK_FAULT.value)
_DEAD_SEEDS = 3
_BASE = {"model": "tiny", "max_dispatch_tokens_per_rank": 64, "policy": "unchecked", "limit": "max-recv"}
_ROUTINGS = ("uniform", "zipf:1.2", "duplicates")
_ARMS = ("", "padded", "control", "repadded", "truncated")

# Options with which a fault is tried, where it has more than one face.
_VARIANTS: dict[str, tuple[dict[str, str], ...]] = {
    "flipped-bit": tuple({"field": field} for field in ("hidden", "scales", "weights", "ids")),
    "corrupt-tokens": ({"rate": "0.005", "rank": "all"}, {"rate": "0.02", "rank": "all"}),
    "hang": ({"stage": "dispatch"}, {"stage": "combine"}),
}
_TOGETHER = (("swapped-rows", "flipped-token-bit"), ("flipped-expert-bit", "flipped-token-bit"))


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """One case with a fault, or with none: what must come of it. `ranks` is empty where the hits tell them."""

    label: str
    entry: Entry
    verdict: str
    stage: str = ""
    ranks: tuple[int, ...] = ()
    bug: str = ""


def trials(ranks: int, seeds: int, clean: int) -> list[Trial]:
    """Return the clean cases, the faults, and last those that cost a launch each."""
    faulty = [trial for seed in range(seeds) for trial in _faulty(ranks, seed)]
    deadly = [trial for trial in faulty if trial.verdict in DEAD]
    return [
        *(_clean(ranks, seed) for seed in range(clean)),
        *(trial for trial in faulty if trial.verdict not in DEAD),
        *deadly,
    ]


def _faulty(ranks: int, seed: int) -> Iterator[Trial]:
    for name, kind in FAULTS.items():
        if kind.verdict in DEAD and seed >= _DEAD_SEEDS:
            continue
        if not _possible(name, ranks):
            continue
        for options in _VARIANTS.get(name, ({},)):
            yield _trial(kind, dict(options), ranks, seed)
    for first, second in _TOGETHER:
        yield _together(first, second, ranks, seed)


def _possible(name: str, ranks: int) -> bool:
    """Whether so many ranks can show the fault: nodes need four, ten experts of a token three."""
    return {"cross-node": ranks % 2 == 0 and ranks >= 4, "slots-lost": ranks >= 3}.get(name, True)  # noqa: PLR2004


def _trial(kind: type[Fault], options: dict[str, str], ranks: int, seed: int) -> Trial:
    chance = random.Random(f"{kind.name}/{options}/{seed}")  # noqa: S311 - a choice of cases, no secret
    label = ":".join([kind.name, ",".join(f"{key}={value}" for key, value in options.items())]).rstrip(":")
    rank = chance.randrange(ranks)
    options = {"rank": str(rank)} | options
    if not kind.arm and not kind.verdict:
        options["arm"] = chance.choice(_ARMS) if options["rank"] != "all" else ""
    keys = _random_keys(chance, ranks)
    if options.get("field") == "scales":
        keys["dispatch_dtype"] = "fp8"
    if kind.name == "own-batch-limit":
        keys["tokens"] = tuple(3 if one == rank else 24 for one in range(ranks))
    if options["rank"] == "all":
        keys |= {"tokens": 128, "max_dispatch_tokens_per_rank": 128}
    keys |= dict(kind.shape)
    keys["inject"] = f"{kind.name}:{','.join(f'{key}={value}' for key, value in options.items() if value)}"
    verdict = kind.verdict or (Verdict.CORRUPT if _spares_padded(kind, options) else Verdict.BASELINE_WRONG).value
    known = () if options["rank"] == "all" or verdict == Verdict.PASS.value else (rank,)
    entry = _entry(f"{label} #{seed}", keys, ranks, "fault", verdict)
    return Trial(
        label=label, entry=entry, verdict=verdict, stage=options.get("stage", kind.stage), ranks=known, bug=kind.bug
    )


def _together(first: str, second: str, ranks: int, seed: int) -> Trial:
    chance = random.Random(f"{first}+{second}/{seed}")  # noqa: S311 - a choice of cases, no secret
    guilty = sorted(chance.sample(range(ranks), 2))
    label = f"{first} + {second}"
    inject = f"{first}:rank={guilty[0]};{second}:rank={guilty[1]}"
    entry = _entry(
        f"{label} #{seed}", _random_keys(chance, ranks) | {"inject": inject}, ranks, "fault", "BASELINE_WRONG"
    )
    return Trial(
        label=label,
        entry=entry,
        verdict=Verdict.BASELINE_WRONG.value,
        stage=SEVERAL,
        ranks=tuple(guilty),
        bug="two faults at once: neither hides the other",
    )


def _spares_padded(kind: type[Fault], options: dict[str, str]) -> bool:
    return (options.get("arm") or kind.arm) not in ("", "padded")


def _clean(ranks: int, seed: int) -> Trial:
    chance = random.Random(f"clean/{seed}")  # noqa: S311 - a choice of cases, no secret
    keys = _random_keys(chance, ranks) | {
        "tokens": (*(chance.choice((0, 1, 5, 17, 32, 48, 64)) for _ in range(ranks - 1)), chance.randint(1, 48)),
        "routing": chance.choice((*_ROUTINGS, "zipf:4", "hot-rank:0", "fan-in:1", "local")),
        "limit": chance.choice(("off", "max-recv", "max-recv+1", "sum", "sum32", "pow2", "capacity", "capacity+5")),
        "policy": chance.choice(("strict", "unchecked", "guard")),
        "gather": chance.choice(("rows", "digests")),
        "slot_order": chance.choice(("shuffled", "source")),
        "topk": chance.randint(1, 4),
        "jitter": chance.choice((0.0, 0.0, 0.0, 1.0)),
        "repeats": chance.choice((1, 1, 1, 2)),
    }
    entry = _entry(f"{CLEAN} #{seed}", keys, ranks, CLEAN, Verdict.PASS.value)
    return Trial(label="", entry=entry, verdict=Verdict.PASS.value)


def _random_keys(chance: random.Random, ranks: int) -> dict[str, Any]:
    most = max(min(40, 240 // ranks), 10)
    return _BASE | {
        "seed": chance.randrange(1 << 30),
        "tokens": tuple(chance.randint(8, most) for _ in range(ranks)),
        "routing": chance.choice(_ROUTINGS),
        "dispatch_dtype": chance.choice(("bf16", "fp8")),
    }


def _entry(name: str, keys: dict[str, Any], ranks: int, tag: str, expect: str) -> Entry:
    resolved = resolve_case([Layer("selftest", keys)], ranks)
    return Entry(name=name, case=resolved.case, sources=resolved.sources, tags=(tag,), expect=expect)
