"""Traffic that was recorded: rows of each step, sizes of the steps, and the model that its loads give."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distbench.case.trace_name import TraceName
from distbench.errors import InvalidCase
from distbench.report.progress import Meter
from distbench.tools.advise.batches import Steps
from distbench.tools.advise.hits import Floats, Placement
from distbench.tools.advise.routing import Model, model_of_counts
from distbench.workload.trace_file import Header, open_trace, read_header, read_slice

_WINDOWS, _MOST_COUNTS = 16, 1 << 26
"""Parts of the steps whose loads are compared: a drift is seen between them; and the most loads that are held."""


class Recording(NamedTuple):
    """Recorded steps, the rows of the fullest rank in each, int64 [S], and the layer and rank that had them, [S, 2]."""

    steps: Steps
    rows: NDArray[np.int64]
    places: NDArray[np.int64]
    model: Model


def read_recording(trace: TraceName, topk: int, placement: Placement, *, own: bool = False) -> Recording:
    """Every step and layer of a trace, or the one that is named; with `own` each token keeps a row on its own rank.

    Raises:
        InvalidCase: as `read_slice`; or it was recorded with other ranks, experts or top-k.

    """
    header = _fitting(trace, topk, placement)
    steps = list(header.steps)
    layers = sorted({layer for known in header.steps.values() for layer in known})
    rows, places = np.zeros(len(steps), dtype=np.int64), np.zeros((len(steps), 2), dtype=np.int64)
    totals, mosts = rows.copy(), rows.copy()
    place_of = {layer: place for place, layer in enumerate(layers)}
    shape = (min(_WINDOWS, len(steps)), len(layers), header.num_experts)
    if math.prod(shape) > _MOST_COUNTS:
        message = (
            f"routing = {trace}: {shape[1]} layers of {shape[2]} experts, allowed are {_MOST_COUNTS // _WINDOWS} "
            "loads; name one step and layer, trace:FILE@STEP.LAYER"
        )
        raise InvalidCase(message)
    counts, opened = np.zeros(shape), open_trace(trace.path)
    with Meter("read steps", len(steps)) as meter:
        for index, step in enumerate(steps):
            window = counts[index * len(counts) // len(steps)]
            for layer in header.steps[step]:
                one = read_slice(header, step, layer, opened)
                received = one.received(header.num_experts, own=own)
                window[place_of[layer]] += np.bincount(one.ids.ravel(), minlength=header.num_experts)
                totals[index], mosts[index] = one.tokens.sum(), one.tokens.max()
                if received.max() > rows[index]:
                    rows[index], places[index] = received.max(), (layer, received.argmax())
            meter.done = index + 1
    text = f"{len(steps)} recorded steps of {trace.path}"
    model = _model(counts, topk, placement, trace.path)
    return Recording(Steps(np.array(steps, dtype=np.int64), totals, mosts, text), rows, places, model)


def _model(counts: Floats, topk: int, placement: Placement, path: str) -> Model:
    used = counts.sum(axis=(0, 2)) > 0
    if not used.any():
        message = f"routing = trace:{path}: no token in it"
        raise InvalidCase(message)
    return model_of_counts(counts[:, used], topk, placement, f"the loads of {path}")


def _fitting(trace: TraceName, topk: int, placement: Placement) -> Header:
    header = read_header(trace.path)
    asked = {"ep_size": placement.ep_size, "num_experts": placement.num_experts, "topk": topk}
    found = header._asdict()
    other = [f"{key} = {found[key]}, not {value}" for key, value in asked.items() if found[key] != value]
    if other or placement.experts.tolist() != list(range(placement.num_experts)):
        told = f"recorded with {', '.join(other)}; give the layer and ranks of the recording"
        if not other:
            told = "its experts are slots here; give --num-experts as many, and no --physical-experts or --placement"
        message = f"routing = {trace}: {told}"
        raise InvalidCase(message)
    if trace.step is None or trace.layer is None:
        return header
    read_slice(header, trace.step, trace.layer)
    return header._replace(steps={trace.step: [trace.layer]})
