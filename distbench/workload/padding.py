"""Inputs of a layer whose last columns are padding, as production pads a model's sizes to its kernels' multiples.

Hidden states, rows of w1 and w2 and biases are zeros there, so intermediate and output columns are. Weights that
multiply padding are not zero: a kernel may read padding or leave it out, but not read anything else in its place.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import pad

from distbench.workload.batch import TokenBatch
from distbench.workload.exact_plan import BLOCK
from distbench.workload.numerics import Numerics

_READ = 2.0**-5
"""Weight of padding, about that of gaussian inputs."""


class PaddedNumerics(NamedTuple):
    """`Numerics` of a layer of `hidden` columns and intermediate rows `inter`, and as many more as the pads say."""

    inner: Numerics
    hidden: int
    hidden_pad: int
    intermediate_pad: int

    def hidden_states(self, keys: Tensor, ids: Tensor) -> Tensor:
        """See `Numerics.hidden_states`."""
        return pad(self.inner.hidden_states(keys, ids), (0, self.hidden_pad))

    def routing_weights(self, keys: Tensor) -> Tensor:
        """See `Numerics.routing_weights`."""
        return self.inner.routing_weights(keys)

    def dense_weights(self, experts: Tensor) -> tuple[Tensor, Tensor]:
        """See `Numerics.dense_weights`."""
        w1, w2 = self.inner.dense_weights(experts)
        halves = pad(w1, (0, self.hidden_pad), value=_READ).unflatten(1, (2, -1))
        columns = pad(w2, (0, self.intermediate_pad), value=_READ)
        return pad(halves, (0, 0, 0, self.intermediate_pad)).flatten(1, 2), pad(columns, (0, 0, 0, self.hidden_pad))

    def biases(self, experts: Tensor) -> tuple[Tensor, Tensor] | None:
        """See `Numerics.biases`."""
        both = self.inner.biases(experts)
        if both is None:
            return None
        halves = pad(both[0].unflatten(1, (2, -1)), (0, self.intermediate_pad))
        return halves.flatten(1, 2), pad(both[1], (0, self.hidden_pad))

    def expert_rows(self, batch: TokenBatch, experts: range) -> Tensor | None:
        """See `Numerics.expert_rows`."""
        scales = None if batch.scales is None else batch.scales[:, : self.hidden // BLOCK]
        rows = self.inner.expert_rows(batch._replace(hidden=batch.hidden[:, : self.hidden], scales=scales), experts)
        return None if rows is None else pad(rows, (0, self.hidden_pad))

    def returned_rows(self, rows: Tensor) -> Tensor:
        """See `Numerics.returned_rows`."""
        return self.inner.returned_rows(rows)
