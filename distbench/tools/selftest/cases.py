"""The cases of a self-test: every fault on random ranks, in random arms, and random cases without one."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from distbench.case.entry import Entry
from distbench.case.resolve import FLAGS, Layer, resolve_case
from distbench.case.spec import Case
from distbench.case.stages import FAULT_ARMS, Arm, Stage
from distbench.errors import InvalidCase, Unsupported, Verdict
from distbench.faults.base import Fault
from distbench.faults.injector import FAULTS
from distbench.launcher.preflight import check_case
from distbench.verify.records import SEVERAL

SUITE = "distbench selftest"
CLEAN = "clean"
DEAD = (Verdict.HANG.value, Verdict.RANK_FAULT.value)
_DEAD_SEEDS = 3
_GAUSSIAN_EVERY = 5
_DRAWS = 20
_BASE = {"model": "tiny", "max_dispatch_tokens_per_rank": 64, "policy": "unchecked", "limit": "max-recv"}
_BASE_LOCAL = 4
"""Experts of a rank in the model of `_BASE`."""
_ROUTINGS = ("uniform", "zipf:1.2", "duplicates")

Keys = dict[str, Any]


class Variant(NamedTuple):
    """One variant of a fault: its options, and further keys of the case."""

    options: Mapping[str, str] = {}
    keys: Mapping[str, Any] = {}

    @property
    def text(self) -> str:
        """Text of the variant in a label."""
        return ",".join(f"{key}={value}" for key, value in {**self.options, **self.keys}.items())


_VARIANTS: dict[str, tuple[Variant, ...]] = {
    "flipped-bit": tuple(Variant({"field": field}) for field in ("hidden", "scales", "weights", "ids")),
    "corrupt-tokens": (Variant({"rate": "0.005", "rank": "all"}), Variant({"rate": "0.02", "rank": "all"})),
    "hang": (Variant({"stage": "dispatch"}), Variant({"stage": "combine"})),
    "signal-lost": (Variant({"stage": "dispatch"}), Variant({"stage": "combine"})),
    "dies-at-304-336": (Variant(keys={"limit": "304"}), Variant(keys={"limit": "336"})),
}
_GAUSSIAN = {"numerics": "gaussian"}
EXACT_ONLY = ("negative-zero", "send-buffer-reused")
"""Few gaussian tokens hold a zero; of wrong rows atomic kernels make other bits, and experts are blamed too."""
# The lowest bits of a row are within what an atomic kernel rounds; this is one of an exponent.
_SEEN_BY_ERRORS = {"flipped-expert-bit": {"bit": "14"}}
_TOGETHER = (("swapped-rows", "flipped-token-bit"), ("flipped-expert-bit", "flipped-token-bit"))


class Guard(NamedTuple):
    """A check of an adapter that ends the rank in `stage`, where a fault passes a package an unchecked argument."""

    stage: str
    always: bool = True


GUARDS: dict[str, dict[str, Guard]] = {
    "mori": {"dispatched-ids": Guard(Stage.COMBINE), "ids-of-the-other-sub-batch": Guard(Stage.COMBINE)},
    "aiter": {
        "weights-not-cut": Guard(Stage.EXPERTS),
        "shifted-window": Guard(Stage.EXPERTS, always=False),
        "flipped-bit:field=ids": Guard(Stage.EXPERTS, always=False),
        "ids-and-weights-dropped": Guard(Stage.EXPERTS),
        "ids-out-of-range": Guard(Stage.EXPERTS),
        "slots-lost": Guard(Stage.EXPERTS),
        "capacity-not-checked": Guard(Stage.EXPERTS),
        "receive-forgotten": Guard(Stage.EXPERTS),
        "row-of-topk-minus-1": Guard(Stage.EXPERTS),
    },
}
"""By transport or experts, and by label."""


class FaultTrial(msgspec.Struct, frozen=True, kw_only=True):
    """One case with a fault, or with none, and its required outcome.

    `ranks` is empty where the fault's hits name them. `guard` is the stage in which an adapter may end the rank
    instead.
    """

    label: str
    entry: Entry
    verdict: str
    stage: str = ""
    ranks: tuple[int, ...] = ()
    bug: str = ""
    guard: str = ""

    @property
    def deadly(self) -> bool:
        """Whether the case may cost a launch."""
        return self.verdict in DEAD or bool(self.guard)


class FaultPlan(msgspec.Struct, frozen=True):
    """Clean cases, faults, last the faults that cost a launch each; and the reasons why others cannot be tried."""

    trials: list[FaultTrial]
    impossible: dict[str, str]


def plan(ranks: int, seeds: int, clean: int, asked: Sequence[Layer] = (), brought: Sequence[str] = ()) -> FaultPlan:
    """Trials of a self-test; `asked` has keys for all cases, overridden only by keys that a fault needs.

    `brought` are faults of plugins, which ranks alone load: see `_Maker.brought`.

    Raises:
        InvalidCase: no case can be made with those keys.
        Unsupported: this machine lacks what they need.

    """
    maker = _Maker(ranks, asked)
    faulty, impossible = _possible_ones(maker, seeds)
    faulty += [maker.brought(name, seed) for name in brought for seed in range(seeds)]
    deadly = [trial for trial in faulty if trial.deadly]
    cleans = [maker.clean(seed) for seed in range(clean)]
    return FaultPlan([*cleans, *(trial for trial in faulty if not trial.deadly), *deadly], impossible)


def trials(ranks: int, seeds: int, clean: int) -> list[FaultTrial]:
    """Trials of the stand-ins."""
    return plan(ranks, seeds, clean).trials


def random_keys(chance: random.Random, ranks: int) -> Keys:
    """Keys of a random small case that passes."""
    most = max(min(40, 240 // ranks), 10)
    return _BASE | {
        "seed": chance.randrange(1 << 30),
        "tokens": tuple(chance.randint(8, most) for _ in range(ranks)),
        "routing": chance.choice(_ROUTINGS),
        "dispatch_dtype": chance.choice(("bf16", "fp8")),
    }


def _possible_ones(maker: _Maker, seeds: int) -> tuple[list[FaultTrial], dict[str, str]]:
    found: list[FaultTrial] = []
    impossible: dict[str, str] = {}
    for name, kind in FAULTS.items():
        reason = _untried(kind, maker.transport) or _too_few_ranks(name, maker.ranks)
        if reason:
            impossible[name] = reason
            continue
        for variant in _variants(name, kind):
            try:
                of_fault = [maker.trial(kind, variant, seed) for seed in _seeds_of(kind, variant, seeds, len(found))]
            except (InvalidCase, Unsupported) as error:
                impossible[_label(kind, variant)] = str(error)
                continue
            found += [trial for count, trial in enumerate(of_fault) if count < _DEAD_SEEDS or not trial.deadly]
    found += [maker.together(*pair, seed) for pair in _TOGETHER for seed in range(seeds)]
    return found, impossible


def _variants(name: str, kind: type[Fault]) -> list[Variant]:
    """Return the variants of a fault, and each of them in gaussian inputs alone, where no exact bit gives it away."""
    given = _VARIANTS.get(name, (Variant(),))
    if kind.verdict or name in EXACT_ONLY:
        return [*given]
    options = _SEEN_BY_ERRORS.get(name, {})
    return [*given, *(Variant({**one.options, **options}, {**one.keys, **_GAUSSIAN}) for one in given)]


def _seeds_of(kind: type[Fault], variant: Variant, seeds: int, number: int) -> range:
    """Return the seeds of a variant: in gaussian inputs each fifth, but all where only errors show the fault."""
    if "numerics" not in variant.keys or kind.stage == Stage.EXPERTS:
        return range(seeds)
    return range(number % _GAUSSIAN_EVERY, seeds, _GAUSSIAN_EVERY)


def _untried(kind: type[Fault], transport: str) -> str:
    """Reason why no self-test tries a fault; empty for none."""
    if kind.transport not in ("", transport):
        return f"a fault of transport {kind.transport} alone"
    return "a race, which shows in some passes only: docs/symmetric.md" if kind.race else ""


def _too_few_ranks(name: str, ranks: int) -> str:
    """Reason why `ranks` ranks are too few to show a fault; empty for none."""
    if name == "cross-node" and (ranks % 2 or ranks < 4):  # noqa: PLR2004 - two nodes of two
        return "needs two nodes of at least two ranks"
    if name in ("mask-all-ones", "shared-counted-twice", "replica-summed-twice") and ranks == 1:
        return "needs two ranks"
    if name == "slots-lost" and ranks < 3:  # noqa: PLR2004 - of four experts each
        return "needs at least ten experts"
    if name in ("dispatched-ids", "ids-of-the-other-sub-batch") and ranks < 3:  # noqa: PLR2004 - with two, nearly all tokens go to both
        return "needs three ranks, so that tokens go to different ones"
    return ""


class _Maker:
    """Makes trials for a number of ranks; `asked` has the requested keys of all of them."""

    def __init__(self, ranks: int, asked: Sequence[Layer]) -> None:
        self.ranks = ranks
        self._asked = list(asked)
        base = self._case({}, _BASE)
        check_case(base)
        self._takes_fp8 = base.experts != "triton" or base.fp8_format == "e4m3fn"
        self.transport = base.transport
        self._guards = GUARDS.get(base.transport, {}) | GUARDS.get(base.experts, {})

    def trial(self, kind: type[Fault], variant: Variant, seed: int) -> FaultTrial:
        """A fault on a random rank, in a random arm."""
        chance = random.Random(f"{kind.name}/{dict(variant.options)}/{seed}")  # noqa: S311 - a choice of cases, no secret
        label = _label(kind, variant)
        rank = chance.randrange(self.ranks)
        options = {"rank": str(rank), **variant.options}
        everywhere = options["rank"] == "all"
        if not kind.arm and not kind.verdict:
            options["arm"] = "" if everywhere else chance.choice(FAULT_ARMS)
        keys, needed = self._random_keys(chance), dict(kind.shape) | dict(variant.keys)
        if options.get("field") == "scales":
            needed["dispatch_dtype"] = "fp8"
        if kind.name == "own-batch-limit":
            needed["tokens"] = tuple(3 if one == rank else 24 for one in range(self.ranks))
        if kind.name == "replica-summed-twice":
            needed |= {"physical_experts": 2 * _BASE_LOCAL * self.ranks, "routing": chance.choice(_ROUTINGS[:2])}
        if everywhere:
            needed |= {"tokens": 128, "max_dispatch_tokens_per_rank": 128}
        needed["inject"] = f"{kind.name}:{','.join(f'{key}={value}' for key, value in options.items() if value)}"
        guard = self._guards.get(_label(kind, Variant(variant.options)))
        verdict, stage = kind.verdict or _verdict(kind, options), options.get("stage", kind.stage)
        if guard is not None and guard.always:
            verdict, stage = Verdict.RANK_FAULT.value, guard.stage
        return FaultTrial(
            label=label,
            entry=self._entry(f"{label} #{seed}", needed, keys, "fault", verdict),
            verdict=verdict,
            stage=stage,
            ranks=() if everywhere or verdict == Verdict.PASS.value else (rank,),
            bug=kind.bug,
            guard=guard.stage if guard is not None else "",
        )

    def brought(self, name: str, seed: int) -> FaultTrial:
        """A plugin's fault on a random rank in the padded arm, where any damage is a wrong baseline.

        Its stage is what the report says that it states.
        """
        chance = random.Random(f"{name}/{seed}")  # noqa: S311 - a choice of cases, no secret
        rank, verdict = chance.randrange(self.ranks), Verdict.BASELINE_WRONG.value
        keys = {"inject": f"{name}:rank={rank},arm={Arm.PADDED}"}
        case = resolve_case(
            [Layer(FLAGS, keys), *self._asked, Layer("selftest", self._random_keys(chance))], self.ranks
        )
        return FaultTrial(
            label=name,
            entry=self._entry_of(case.case, f"{name} #{seed}", "fault", verdict),
            verdict=verdict,
            ranks=(rank,),
            bug="a fault of a plugin",
        )

    def together(self, first: str, second: str, seed: int) -> FaultTrial:
        """Two faults on two ranks."""
        chance = random.Random(f"{first}+{second}/{seed}")  # noqa: S311 - a choice of cases, no secret
        guilty = sorted(chance.sample(range(self.ranks), 2))
        label, verdict = f"{first} + {second}", Verdict.BASELINE_WRONG.value
        needed = {"inject": f"{first}:rank={guilty[0]};{second}:rank={guilty[1]}"}
        return FaultTrial(
            label=label,
            entry=self._entry(f"{label} #{seed}", needed, self._random_keys(chance), "fault", verdict),
            verdict=verdict,
            stage=SEVERAL,
            ranks=tuple(guilty),
            bug="two faults at once: neither hides the other",
        )

    def clean(self, seed: int) -> FaultTrial:
        """A random case without a fault; every fifth has gaussian inputs.

        A case that the requested keys do not allow is drawn again.
        """
        chance = random.Random(f"clean/{seed}")  # noqa: S311 - a choice of cases, no secret
        gaussian = {"numerics": "gaussian", "require": "tolerance", "dispatch_dtype": "bf16"}
        needed = gaussian if seed % _GAUSSIAN_EVERY == _GAUSSIAN_EVERY - 1 else {}
        for last in (*[False] * _DRAWS, True):
            try:
                entry = self._entry(f"{CLEAN} #{seed}", needed, self._clean_keys(chance), CLEAN, Verdict.PASS.value)
                break
            except (InvalidCase, Unsupported):
                if last:
                    raise
        return FaultTrial(label="", entry=entry, verdict=Verdict.PASS.value)

    def _clean_keys(self, chance: random.Random) -> Keys:
        return self._random_keys(chance) | {
            "tokens": (
                *(chance.choice((0, 1, 5, 17, 32, 48, 64)) for _ in range(self.ranks - 1)),
                chance.randint(1, 48),
            ),
            "routing": chance.choice((*_ROUTINGS, "zipf:4", "hot-rank:0", "fan-in:1", "local")),
            "limit": chance.choice(("off", "max-recv", "max-recv+1", "sum", "sum32", "pow2", "capacity", "capacity+5")),
            "policy": chance.choice(("strict", "unchecked", "guard")),
            "gather": chance.choice(("rows", "digests")),
            "slot_order": chance.choice(("shuffled", "source")),
            "topk": chance.randint(1, 4),
            "jitter": chance.choice((0.0, 0.0, 0.0, 1.0)),
            "repeats": chance.choice((1, 1, 1, 2)),
            **chance.choice(({}, {}, {}, {"shared_experts": 1}, {"physical_experts": 2 * _BASE_LOCAL * self.ranks})),
        }

    def _random_keys(self, chance: random.Random) -> Keys:
        keys = random_keys(chance, self.ranks)
        return keys if self._takes_fp8 else keys | {"dispatch_dtype": "bf16"}

    def _entry(self, name: str, needed: Keys, keys: Keys, tag: str, expect: str) -> Entry:
        return self._entry_of(self._case(needed, keys), name, tag, expect)

    def _entry_of(self, case: Case, name: str, tag: str, expect: str) -> Entry:
        check_case(case)
        return Entry(name=name, case=case, sources={}, suite=SUITE, tags=(tag,), expect=expect)

    def _case(self, needed: Keys, keys: Keys) -> Case:
        return resolve_case([Layer("fault", needed), *self._asked, Layer("selftest", keys)], self.ranks).case


def _label(kind: type[Fault], variant: Variant) -> str:
    return ":".join(filter(None, (kind.name, variant.text)))


def _verdict(kind: type[Fault], options: Mapping[str, str]) -> str:
    spares_padded = (options.get("arm") or kind.arm) not in ("", Arm.PADDED)
    verdict = Verdict.CORRUPT if spares_padded else Verdict.BASELINE_WRONG
    return str(verdict.value)
