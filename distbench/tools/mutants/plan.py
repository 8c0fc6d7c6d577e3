"""The cases that try a mutant: each setting, arm, seed and kind of inputs, and the same cases without it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from distbench.case.entry import Entry
from distbench.case.resolve import Layer, resolve_case
from distbench.case.spec import Case
from distbench.case.stages import Arm
from distbench.errors import InvalidCase, Verdict
from distbench.faults.mutants import CORPUS
from distbench.faults.mutants.corpus import Mutant
from distbench.faults.mutants.fault import unfit
from distbench.launcher.preflight import check_case

NUMERICS = ("exact", "gaussian")
ARMS: Mapping[str, str] = {"all": "", "truncated": Arm.TRUNCATED}
"""Arms that have the mutant, by keyword: all of them, so that the baseline is equally wrong, or one."""

RANKS = 2
SUITE = "distbench mutants"

_BASE: Mapping[str, Any] = {
    "model": "tiny",
    "hidden_size": 512,
    "intermediate_size": 256,
    "max_dispatch_tokens_per_rank": 256,
    "limit": "max-recv",
    "policy": "unchecked",
}
_TOKENS = (72, 67)
_QUANTISED: Mapping[str, Any] = {"transport": "mori", "emulate": True, "topk": 8}
_SETTINGS: dict[str, Mapping[str, Any]] = {
    "bf16": {},
    "fp8": {"dispatch_dtype": "fp8"},
    "cast": {**_QUANTISED, "combine_quant": "fp8_direct_cast"},
    "blockwise": {**_QUANTISED, "combine_quant": "fp8_blockwise"},
    "gelu": {"activation": "gelu"},
    "limit": {"swiglu_limit": 10.0},
    "weights first": {"doweight_stage1": True},
    "bias fp8": {"bias": True, "dispatch_dtype": "fp8", "intermediate_size": 384},
    "gpt-oss": {
        "activation": "swiglu",
        "bias": True,
        "hidden_pad": 64,
        "intermediate_size": 384,
        "intermediate_pad": 64,
    },
}


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One case of a mutant, or of none where `mutant` is empty, which must not alarm."""

    mutant: str
    setting: str
    arm: str
    seed: int
    numerics: str
    entry: Entry

    @property
    def key(self) -> tuple[str, str, str, int]:
        """Key that pairs a run in exact inputs with the one in gaussian inputs."""
        return self.mutant, self.setting, self.arm, self.seed


class MutantPlan(msgspec.Struct, frozen=True):
    """All runs; the mutants that are tried, and why others cannot be applied to these parts."""

    runs: list[Run]
    mutants: list[Mutant]
    left_out: dict[str, str]


def plan(
    ranks: int, seeds: int, only: Sequence[str] = (), asked: Sequence[Layer] = (), arms: Sequence[str] = tuple(ARMS)
) -> MutantPlan:
    """Runs of the corpus, or of the mutants and classes that `only` names.

    `asked` has keys for all cases, `arms` are of ARMS.

    Raises:
        InvalidCase: no mutant and no class has such a name, or no case can be made with those keys.
        Unsupported: this machine lacks what they need.

    """
    maker = _Maker(ranks, asked)
    chosen = choose(only)
    left_out = {mutant.name: reason for mutant in chosen if (reason := maker.left_out(mutant))}
    tried = [mutant for mutant in chosen if mutant.name not in left_out]
    settings = dict.fromkeys(setting for mutant in tried for setting in maker.settings_of(mutant))
    runs = [*maker.clean(settings, seeds), *(run for mutant in tried for run in maker.runs(mutant, seeds, arms))]
    return MutantPlan(runs, tried, left_out)


def choose(only: Sequence[str]) -> list[Mutant]:
    """Mutants that `only` names, or whose class it names; all where it is empty.

    Raises:
        InvalidCase: no mutant and no class has such a name.

    """
    classes = dict.fromkeys(mutant.kind for mutant in CORPUS.values())
    unknown = [word for word in only if word not in CORPUS and word not in classes]
    if unknown:
        message = (
            f"--only {unknown[0]!r:.60}: no mutant and no class of this name; classes are {', '.join(classes)}, "
            "and `distbench mutants --list` has all names"
        )
        raise InvalidCase(message)
    return [mutant for mutant in CORPUS.values() if not only or mutant.name in only or mutant.kind in only]


class _Maker:
    """Makes cases for a number of ranks; `asked` has the requested keys of all of them."""

    def __init__(self, ranks: int, asked: Sequence[Layer]) -> None:
        self._ranks = ranks
        self._asked = list(asked)
        self._base = self._case("bf16", {})

    def settings_of(self, mutant: Mutant) -> tuple[str, ...]:
        """Settings of a mutant that the requested parts support."""
        emulated = self._base.experts == "reference"
        return tuple(one for one in mutant.settings if emulated or "transport" not in _SETTINGS[one])

    def left_out(self, mutant: Mutant) -> str:
        """Reason why a mutant cannot be tried with the requested parts; empty for none."""
        reason = unfit(mutant, self._base.experts, self._base.transport, self._base.device)
        if not reason and not self.settings_of(mutant):
            return "needs a quantised combine, which only MoRI has"
        return reason

    def clean(self, settings: Sequence[str] | Mapping[str, Any], seeds: int) -> Iterator[Run]:
        """Yield a run without a mutant for each setting, seed and kind of inputs."""
        for setting in settings:
            for seed in range(seeds):
                yield from self._both("", setting, "", seed)

    def runs(self, mutant: Mutant, seeds: int, arms: Sequence[str]) -> Iterator[Run]:
        """Yield the runs of a mutant."""
        for setting in self.settings_of(mutant):
            for arm in arms:
                for seed in range(seeds):
                    yield from self._both(mutant.name, setting, arm, seed)

    def _both(self, mutant: str, setting: str, arm: str, seed: int) -> Iterator[Run]:
        named = ",arm=".join(filter(None, (f"mutant:name={mutant}", ARMS.get(arm))))
        for numerics in NUMERICS:
            keys = {"inject": named if mutant else "", "numerics": numerics, "seed": seed}
            case = self._case(setting, keys)
            check_case(case)
            name = " ".join(filter(None, (mutant or "clean", setting, arm, numerics, f"#{seed}")))
            expect = _expected(mutant, arm)
            yield Run(
                mutant=mutant,
                setting=setting,
                arm=arm,
                seed=seed,
                numerics=numerics,
                entry=Entry(name=name, suite=SUITE, case=case, sources={}, tags=(mutant or "clean",), expect=expect),
            )

    def _case(self, setting: str, keys: Mapping[str, Any]) -> Case:
        tokens = tuple(_TOKENS[rank % len(_TOKENS)] for rank in range(self._ranks))
        own = {**_BASE, "tokens": tokens, **_SETTINGS[setting]}
        if own.get("topk") == 8:  # noqa: PLR2004 - half of the experts, as with top-k 4
            own["num_experts"] = 8 * self._ranks
        layers = [Layer("mutants", {**keys}), *self._asked, Layer("mutants", own)]
        return resolve_case(layers, self._ranks).case


def _expected(mutant: str, arm: str) -> str:
    if not mutant or CORPUS[mutant].equivalent:
        return str(Verdict.PASS.value)
    return str((Verdict.CORRUPT if arm == Arm.TRUNCATED else Verdict.BASELINE_WRONG).value)
