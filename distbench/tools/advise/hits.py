"""Chance that a token sends a row to a rank, for each rank, where it draws k distinct experts by their weights.

The draws are successive, without replacement: the next expert is taken with a probability in proportion to its weight
among those left. The k experts are then the first k of E independent exponential clocks with the weights as rates,
which turns the chance into one integral over time. A replicated expert sends the token to each replica alike often.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from distbench.case.spec import Case

Floats = NDArray[np.float64]

_STEP = 0.25
"""Step of ln(time): the integrand is analytic within pi/2 of the axis, so the error is about exp(-pi**2 / 0.25)."""
_EARLY, _LATE = 1e-13, 40.0
"""Chance that k clocks have rung at the first time; rate of the k-th fastest clock times the last time."""
_MOST_FITS, _FIT = 20, 1e-5
"""Steps to fit weights, and the relative error that ends them."""
_PART = 1 << 20
"""Numbers of one array of states."""


class Placement(NamedTuple):
    """Slots of the ranks: slot p lies on rank p // slots_per_rank and holds the logical expert experts[p]."""

    experts: NDArray[np.int64]
    slots_per_rank: int
    num_experts: int

    @property
    def ep_size(self) -> int:
        """Number of ranks W."""
        return len(self.experts) // self.slots_per_rank

    @property
    def replicas(self) -> NDArray[np.int64]:
        """Slots of each logical expert, int64 [E]."""
        return np.bincount(self.experts, minlength=self.num_experts)


def placement_of(case: Case) -> Placement:
    """Slots of a case's routed experts."""
    if not case.placement:
        return round_robin(case.num_experts, case.physical_experts or case.num_experts, case.ep_size)
    slots = np.array(case.placement, dtype=np.int64)
    return Placement(slots, len(slots) // case.ep_size, case.num_experts)


def round_robin(num_experts: int, num_slots: int, ep_size: int) -> Placement:
    """Placement of slot p for expert p % E: without replicas slot p holds expert p."""
    return Placement(np.arange(num_slots, dtype=np.int64) % num_experts, num_slots // ep_size, num_experts)


class Groups(NamedTuple):
    """Ranks that a token reaches with one chance each: `chances` float64 [G], `group` int64 [W] of each rank."""

    chances: Floats
    group: NDArray[np.int64]

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Ranks of each group, int64 [G]."""
        return np.bincount(self.group, minlength=len(self.chances))


class HitChances:
    """Chances of ranks by their experts' weights, kept between layers whose weights are the same in another order."""

    def __init__(self, topk: int, placement: Placement) -> None:
        """`topk` experts of a token, on the ranks of `placement`."""
        self._topk = topk
        self._experts, self._parts = _held(placement)
        self._known: dict[tuple[bytes, tuple[tuple[float, float], ...]], float] = {}

    def of(self, weights: Floats) -> Groups:
        """Chance of each rank where a token draws by `weights`, float64 [E], all above 0."""
        alike = np.sort(weights).tobytes()
        found: dict[tuple[bytes, tuple[tuple[float, float], ...]], int] = {}
        missing: dict[tuple[bytes, tuple[tuple[float, float], ...]], tuple[tuple[int, float], ...]] = {}
        group = np.empty(len(self._experts), dtype=np.int64)
        for rank, (experts, parts) in enumerate(zip(self._experts, self._parts, strict=True)):
            held = zip((float(weights[expert]) for expert in experts), parts, strict=True)
            key = (alike, tuple(sorted(held)))
            group[rank] = found.setdefault(key, len(found))
            if key not in self._known:
                missing[key] = tuple(zip(experts, parts, strict=True))
        if missing:
            missed = _missed(weights, self._topk, tuple(missing.values()))
            self._known |= zip(missing, np.clip(1.0 - missed, 0.0, 1.0).tolist(), strict=True)
        return Groups(np.array([self._known[key] for key in found]), group)


def hit_chances(weights: Floats, topk: int, placement: Placement) -> Groups:
    """Chance of each rank under draws by `weights`, float64 [E], all above 0."""
    return HitChances(topk, placement).of(weights)


def inclusions(weights: Floats, topk: int) -> Floats:
    """Chance that a token chooses each expert, float64 [E]: its clock rings while fewer than k others have rung."""
    scaled = weights / weights.sum()
    if topk == len(weights):
        return np.ones(len(weights))
    last = math.log(_LATE / float(np.sort(scaled)[-topk]))
    times = np.exp(np.arange(math.log(_EARLY), last + _STEP, _STEP))
    silent = np.exp(-np.outer(scaled, times))
    before, after = _rung(silent, topk), _rung(silent[::-1], topk)[::-1]
    chances = np.empty(len(weights))
    for expert, weight in enumerate(scaled):
        few = np.cumsum(after[expert], axis=0)[::-1]  # at most k - 1, ..., 0 later ones have rung
        chances[expert] = ((before[expert] * few).sum(axis=0) * weight * times * silent[expert]).sum() * _STEP
    return np.minimum(chances, 1.0)


def _rung(silent: Floats, topk: int) -> Floats:
    """Law of how many of the experts before each have rung, up to k - 1: float64 [E, k, times]."""
    laws = np.zeros((len(silent), topk, silent.shape[1]))
    laws[0, 0] = 1.0
    for expert in range(1, len(silent)):
        earlier, quiet = laws[expert - 1], silent[expert - 1]
        laws[expert] = earlier * quiet
        laws[expert, 1:] += earlier[:-1] * (1 - quiet)
    return laws


def fitting_weights(loads: Floats, topk: int) -> Floats:
    """Weights by which experts are chosen with the chances `loads`, float64 [E], above 0 and below 1, of sum k.

    The first guess is that of Rosén's order sampling; each step corrects it by the chances that it gives.
    """
    wanted = -np.log1p(-loads)
    weights = wanted
    for _ in range(_MOST_FITS):
        found = inclusions(weights, topk)
        if np.abs(found / loads - 1).max() < _FIT:
            break
        weights = weights * wanted / -np.log1p(-np.minimum(found, 1 - 1e-12))
    return np.asarray(weights)


def _held(placement: Placement) -> tuple[list[list[int]], list[list[float]]]:
    """Experts of each rank, and the shares of their tokens that come there."""
    replicas = placement.replicas
    experts: list[list[int]] = []
    parts: list[list[float]] = []
    for slots in placement.experts.reshape(placement.ep_size, -1):
        held, counts = np.unique(slots, return_counts=True)
        experts.append(held.tolist())
        parts.append((counts / replicas[held]).tolist())
    return experts, parts


def _missed(weights: Floats, topk: int, shares: Sequence[tuple[tuple[int, float], ...]]) -> Floats:
    """Chance that a token sends no row to ranks with these experts and shares, float64 [G]."""
    if weights.min() == weights.max():
        return np.array([_missed_alike(len(weights), topk, [share for _, share in one]) for one in shares])
    keep = np.ones((len(shares), len(weights)))
    for row, one in enumerate(shares):
        for expert, share in one:
            keep[row, expert] = 1.0 - share
    return _integrated(weights, topk, keep)


def _missed_alike(num_experts: int, topk: int, shares: Sequence[float]) -> float:
    """The same where all weights are equal: every set of k experts is equally likely, so it is a ratio of counts."""
    terms = [1.0]
    for share in shares:
        terms = [a + (1.0 - share) * b for a, b in zip([*terms, 0.0], [0.0, *terms], strict=True)]
    others = num_experts - len(shares)
    every = math.comb(num_experts, topk)
    # math.comb is exact, and a ratio of two whole numbers is rounded once.
    return math.fsum(
        term * (math.comb(others, topk - taken) / every) for taken, term in enumerate(terms[: topk + 1]) if term
    )


def _integrated(weights: Floats, topk: int, keep: Floats) -> Floats:
    """Chance that all k experts are kept, float64 [G], where expert e of row g is kept with chance keep[g, e].

    The k-th clock rings at time t, one of the kept; k - 1 others have rung and are kept; the rest have not rung.
    """
    if topk == len(weights):
        return np.asarray(np.prod(keep, axis=1))
    scaled = weights / weights.sum()
    last = math.log(_LATE / float(np.sort(scaled)[-topk]))
    times = np.exp(np.arange(math.log(_EARLY) / topk, last + _STEP, _STEP))
    rows = max(_PART // (len(times) * topk), 1)
    parts = [_states(scaled, topk, keep[start : start + rows], times) for start in range(0, len(keep), rows)]
    total = _states(scaled, topk, np.ones((1, len(weights))), times)[0]
    return np.asarray(np.concatenate(parts) / total)


def _states(weights: Floats, topk: int, keep: Floats, times: Floats) -> Floats:
    rung = np.zeros((len(keep), topk, len(times)))  # by the number of kept clocks that have rung before
    rung[:, 0] = 1.0
    last = np.zeros_like(rung)  # and one of them rings now
    for expert, weight in enumerate(weights):
        silent = np.exp(-weight * times)
        kept = keep[:, expert, None, None]
        rings, now = kept * -np.expm1(-weight * times), kept * (weight * times * silent)
        moved, moved_last = rung[:, :-1] * rings, last[:, :-1] * rings
        last *= silent
        last[:, 1:] += moved_last
        last += rung * now
        rung *= silent
        rung[:, 1:] += moved
    return np.asarray(last[:, topk - 1].sum(axis=1) * _STEP)
