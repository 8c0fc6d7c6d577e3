"""Chance of each rank in each layer, by a synthetic routing or by histograms of the experts' loads."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

import msgspec
import numpy as np
from numpy.typing import NDArray

from distbench.case.table_file import open_regular
from distbench.errors import InvalidCase
from distbench.report.progress import Meter
from distbench.tools.advise.hits import Floats, Groups, HitChances, Placement, fitting_weights
from distbench.tools.recorded.readers import load_tensors
from distbench.utils.text import shown, why
from distbench.workload.routing_spec import Routing

_MOST_BYTES = 256 << 20
_MOST_LOAD = 0.999
_DRIFT_S = 6.0
"""Standard deviations of a chi-square sum from which histograms are not draws from one distribution."""
_STEPS_DIMENSIONS = 3


class Model(NamedTuple):
    """Ranks of each layer by chance; `own` is 1 where every token keeps a row on its own rank; `text` names the model.

    `drift` says why the model does not hold, empty where nothing speaks against it.
    """

    layers: list[Groups]
    own: int
    text: str
    drift: str = ""


def synthetic_model(routing: Routing, topk: int, placement: Placement, layers: int, seed: int) -> Model:
    """Model of a kind of routing of `run`.

    Raises:
        InvalidCase: a kind that is not defined with replicated experts.

    """
    ranks, local = placement.ep_size, placement.slots_per_rank
    if routing.kind == "uniform":
        groups = HitChances(topk, placement).of(np.ones(placement.num_experts))
        return Model([groups] * layers, 0, f"{topk} distinct experts, all alike")
    if routing.kind == "zipf":
        return _zipf(routing, topk, placement, layers, seed)
    if len(placement.experts) != placement.num_experts:
        message = f"routing = {routing}: not defined with replicated experts; use uniform, zipf:S or --histogram"
        raise InvalidCase(message)
    target = int(routing.parameter)
    one = np.arange(ranks) == target
    if routing.kind == "hot-rank":
        elsewhere = placement.num_experts - local
        hot = max(min(-(-topk // 2), local), topk - elsewhere)
        cold = topk - hot
        missed = math.comb(elsewhere - local, cold) / math.comb(elsewhere, cold) if elsewhere else 1.0
        groups = Groups(np.array([1 - missed, 1.0]), one.astype(np.int64))
        return Model([groups] * layers, 0, f"{hot} experts of rank {target}, {cold} others alike")
    if routing.kind == "fan-in":
        groups = Groups(np.array([0.0, 1.0]), one.astype(np.int64))
        return Model([groups] * layers, 0, f"all experts on rank {target}")
    everywhere = np.zeros(ranks, dtype=np.int64)
    if routing.kind == "local":
        return Model([Groups(np.zeros(1), everywhere)] * layers, 1, "all experts on the token's own rank")
    owners = min(max(-(-topk // local), 2), ranks, topk)
    groups = Groups(np.array([owners / ranks]), everywhere)
    return Model([groups] * layers, 0, f"experts of {owners} ranks, all alike")


def _zipf(routing: Routing, topk: int, placement: Placement, layers: int, seed: int) -> Model:
    rng, chances = np.random.default_rng(seed), HitChances(topk, placement)
    weights = np.maximum((np.arange(placement.num_experts) + 1.0) ** -routing.parameter, 1e-300)
    found = [chances.of(rng.permutation(weights)) for _ in range(layers)]
    return Model(found, 0, f"{topk} successive draws by 1/position^{routing.parameter:g}, its own order in each layer")


def histogram_model(path: str, topk: int, placement: Placement, layers: int) -> Model:
    """Model of the loads in a file: counts of experts [E], of layers [L, E], or of steps and layers [T, L, E].

    A single histogram stands for `layers` layers.

    Raises:
        InvalidCase: it cannot be read, or has another number of experts.

    """
    counts = _counts(path, placement.num_experts)
    steps = counts if counts.ndim == _STEPS_DIMENSIONS else counts.reshape(1, -1, placement.num_experts)
    steps = steps[:, steps.sum(axis=(0, 2)) > 0]  # a dense layer has no counts
    model = model_of_counts(steps, topk, placement, f"the loads of {path}")
    return model._replace(layers=model.layers * (layers if len(model.layers) == 1 else 1))


def model_of_counts(steps: Floats, topk: int, placement: Placement, source: str) -> Model:
    """Model of the loads of experts, float64 [T, L, E], by successive steps; `source` names them."""
    chances, found = HitChances(topk, placement), []
    with Meter("fit layers", steps.shape[1]) as meter:
        for layer in steps.sum(axis=0):
            found.append(chances.of(_weights(layer, topk)))
            meter.done += 1
    return Model(found, 0, f"{topk} successive draws by {source}", _drift(steps))


def _weights(counts: Floats, topk: int) -> Floats:
    """Weights of the draws by which experts are chosen as often as counted.

    Half a route is added to each count, so that an expert that was not chosen may be. No expert is chosen by all
    tokens: what is above that is spread over the others.
    """
    loads = topk * (counts + 0.5) / (counts + 0.5).sum()
    for _ in range(topk):
        full = loads >= _MOST_LOAD
        if not full.any():
            break
        loads = np.where(full, _MOST_LOAD, loads * (topk - _MOST_LOAD * full.sum()) / loads[~full].sum())
    return fitting_weights(loads, topk)


def _drift(steps: Floats) -> str:
    """The first layer whose histograms of successive steps are not draws from one distribution; empty for none.

    The chi-square sum of draws with replacement: draws of distinct experts vary less.
    """
    for layer in range(steps.shape[1]):
        counts = steps[:, layer]
        used, rows = counts.sum(axis=0) > 0, counts.sum(axis=1) > 0
        counts = counts[rows][:, used]
        freedom = (counts.shape[0] - 1) * (counts.shape[1] - 1)
        if freedom < 1:
            continue
        expected = counts.sum(axis=1, keepdims=True) * counts.sum(axis=0) / counts.sum()
        surprise = float(((counts - expected) ** 2 / expected).sum())
        share = 2 / (9 * freedom)
        deviation = ((surprise / freedom) ** (1 / 3) - (1 - share)) / math.sqrt(share)
        if deviation > _DRIFT_S:
            return f"the loads of layer {layer} drift over the steps ({deviation:.0f} standard deviations)"
    return ""


def _counts(path: str, num_experts: int) -> Floats:
    try:
        with os.fdopen(open_regular(path), "rb") as stream:
            if os.fstat(stream.fileno()).st_size > _MOST_BYTES:
                _refuse(path, f"more than {_MOST_BYTES >> 20} MiB; sum its steps")
            counts = _array(path, stream)
    except (OSError, ValueError, TypeError, LookupError, EOFError, RuntimeError, MemoryError) as error:
        reason = why(error)
        _refuse(path, f"cannot be read ({reason}); give .npy, lists of numbers as .json, or .pt of SGLang", error)
    if counts.dtype.kind not in "iuf" or not 1 <= counts.ndim <= _STEPS_DIMENSIONS or not counts.size:
        _refuse(path, f"an array {counts.dtype} {shown(counts.shape)}; allowed are numbers [E], [L, E] or [T, L, E]")
    if counts.shape[-1] != num_experts:
        _refuse(path, f"loads of {counts.shape[-1]} experts, the model has {num_experts}")
    counts = counts.astype(np.float64)
    if not np.isfinite(counts).all() or (counts < 0).any() or not counts.sum(axis=-1).max() > 0:
        _refuse(path, "loads below 0, infinite, or all 0")
    return np.asarray(counts)


def _array(path: str, stream: IO[bytes]) -> NDArray[Any]:
    """Counts of a file; SGLang's recorder in mode stat, and EPLB's JSON, have them as logical_count."""
    suffix = Path(path).suffix
    if suffix == ".npy":
        loaded = np.load(stream, allow_pickle=False)
        if not isinstance(loaded, np.ndarray):
            _refuse(path, "an archive of arrays; give one array, as numpy.save writes it")
        return loaded
    found = load_tensors(path) if suffix == ".pt" else msgspec.json.decode(stream.read())
    counts: Any = found["logical_count"] if isinstance(found, dict) else found
    if hasattr(counts, "numel") and counts.numel() > _MOST_BYTES // 8:  # it may repeat one number without room for it
        _refuse(path, f"{counts.numel()} loads, allowed are {_MOST_BYTES // 8}; sum its steps")
    return np.array(counts.tolist() if hasattr(counts, "tolist") else counts, dtype=np.float64)


def _refuse(path: str, reason: str, cause: BaseException | None = None) -> NoReturn:
    message = f"--histogram {path!r:.200}: {reason}"
    raise InvalidCase(message) from cause
