"""Experts run from CUDA graphs: captured once per number of rows, replayed with the buffers' current contents.

A capture records kernels and their addresses. A kernel chosen on the host from a device value would be replayed
wrongly, so no code in between may read one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from distbench.errors import Unsupported
from distbench.experts.base import ExpertInput, Experts, ExpertsAround, ExpertWeights
from distbench.utils.text import one_line
from distbench.verify.row_compare import integer_view
from distbench.workload.batch import TokenBatch


class Captured(NamedTuple):
    """A graph and its output, the bytes that the capture left allocated, and its further peak bytes.

    The latter stay the graph's own, and count as free between replays.
    """

    graph: torch.cuda.CUDAGraph
    output: Tensor
    kept: int
    workspace: int


class GraphedExperts(ExpertsAround):
    """Experts that capture each call of others, by rows and addresses, and replay it from then on."""

    def __init__(self, inner: Experts) -> None:
        super().__init__(inner)
        self._graphs: dict[tuple[int, ...], Captured] = {}

    def __call__(self, given: ExpertInput, weights: ExpertWeights) -> Tensor:
        """See `Experts.__call__`.

        Raises:
            Unsupported: the experts cannot be captured.

        """
        key = (given.rows, *(0 if tensor is None else tensor.data_ptr() for tensor in (*given, *weights)))
        if key not in self._graphs:
            self._graphs[key] = _captured(partial(self.inner, given, weights), given.num_local_tokens)
        captured = self._graphs[key]
        captured.graph.replay()
        return captured.output

    def uncounted_bytes(self, rows: int) -> int:
        """Device bytes that calls with `rows` rows take beyond those that torch counts as allocated meanwhile.

        These are the bytes that their graphs write besides the output, less the remains of captures of other calls.
        """
        mine = [captured.workspace for key, captured in self._graphs.items() if key[0] == rows]
        others = [captured.kept for key, captured in self._graphs.items() if key[0] != rows]
        return sum(mine) - sum(others)


def prove_capture(experts: Experts, weights: ExpertWeights, like: TokenBatch, rows: int) -> None:
    """Capture a call of `experts` with `rows` rows like those of `like`, none of them live, and discard the graph.

    Raises:
        Unsupported: the experts cannot be captured, on any rank.

    """
    given = ExpertInput(
        hidden=_zeros(like.hidden, rows),
        scales=None if like.scales is None else _zeros(like.scales, rows),
        weights=_zeros(like.weights, rows),
        ids=_zeros(like.ids, rows),
        num_local_tokens=like.ids.new_zeros(1),
    )
    _captured(partial(experts, given, weights), given.num_local_tokens)


def _zeros(like: Tensor, rows: int) -> Tensor:
    made = like.new_empty(rows, like.shape[1])
    integer_view(made).zero_()
    return made


def _captured(call: Callable[[], Tensor], num_local_tokens: Tensor) -> Captured:
    """Capture `call` with no live row, so that every replay has other counts than the capture."""
    live = num_local_tokens.clone()
    warm_up(call)
    num_local_tokens.zero_()
    try:
        return capture(call, "the experts")
    finally:
        num_local_tokens.copy_(live)


def warm_up(call: Callable[[], object]) -> None:
    """Make `call` on a stream of its own: it compiles and allocates what a capture may not."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


def capture(call: Callable[[], Tensor], what: str) -> Captured:
    """Capture `call`, that of `what`, after `warm_up`.

    Raises:
        Unsupported: it does what no capture allows; any other error is raised as it is.
    """
    graph = torch.cuda.CUDAGraph()
    first: Exception | None = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    try:
        with torch.cuda.graph(graph):
            try:
                output = call()
            except Exception as error:  # the end of a capture may raise over it
                first = error
                raise
    except RuntimeError as error:
        cause = first or error
        if not _is_forbidden(cause):
            raise cause from None
        message = (
            f"graph: {what} cannot be captured ({one_line(cause)}); a host read of a device value or a "
            "synchronisation in it forbids it: run without --graph"
        )
        raise Unsupported(message) from cause
    after = torch.cuda.memory_allocated()
    return Captured(graph, output, after - before, torch.cuda.max_memory_allocated() - after)


def _is_forbidden(error: Exception) -> bool:
    """Whether an error is one of capturing: cudaErrorStreamCapture..., hipErrorStreamCapture..., or torch's own."""
    return not isinstance(error, torch.OutOfMemoryError) and "captur" in str(error).lower()
