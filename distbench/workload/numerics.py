"""What a source of values gives: exact or gaussian inputs, padded or not."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from distbench.workload.batch import TokenBatch


class Numerics(Protocol):
    """Source of values: exact or gaussian. `keys` int64 [n] identify tokens (`token_keys`), `experts` int64 [e]."""

    def hidden_states(self, keys: Tensor, ids: Tensor) -> Tensor:
        """Return bf16 [n, H] for tokens that go to experts `ids` [n, k]."""

    def routing_weights(self, keys: Tensor) -> Tensor:
        """Return float32 [n, k]."""

    def dense_weights(self, experts: Tensor) -> tuple[Tensor, Tensor]:
        """Return w1 bf16 [e, 2I, H], gate rows before up rows, and w2 bf16 [e, H, I]."""

    def biases(self, experts: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return bias1 float32 [e, 2I], gate before up, and bias2 float32 [e, H]; None where the layer has none."""

    def expert_rows(self, batch: TokenBatch, experts: range) -> Tensor | None:
        """Return the only correct result of the batch's experts in `experts`, bf16 [n, H]; None where bits may vary."""

    def returned_rows(self, rows: Tensor) -> Tensor:
        """Return expert rows [m, H] as combine adds them: after the trip back, where its arithmetic is known."""
