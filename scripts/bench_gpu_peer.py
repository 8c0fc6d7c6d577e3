"""The experts' work as a composition on torch's grouped matrix product."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from distbench.experts.base import ExpertInput, ExpertWeights
from distbench.workload.batch import TokenBatch


class GroupedPeer:
    """Grouped experts that sort as the Triton experts do.

    The number of local routes is known on the device only, so all M * k places are gathered and weighted; with `told`
    the host knows the number, as in no call of fused_moe, and only the local routes are computed.
    """

    def __init__(self, local: ExpertWeights, *, told: bool) -> None:
        """View the weights [El, N, K] as grouped_mm needs them, [El, K, N]."""
        self.name = "grouped_mm told" if told else "grouped_mm"
        self._local, self._told = local, told
        self._w1, self._w2 = local.w1.transpose(1, 2), local.w2.transpose(1, 2)

    def take(self, batch: TokenBatch) -> None:
        """Compute `batch`, all of its rows live, from now on."""
        self._batch = batch
        local = int((batch.ids < self._w1.shape[0]).sum())
        self._routes = local if self._told else batch.ids.numel()
        self._number = torch.arange(self._routes, device=batch.ids.device)
        self._live = torch.tensor([batch.ids.shape[0]], dtype=torch.int32, device=batch.ids.device)

    def device_bytes(self) -> int:
        """Estimated device bytes of a call: places times three rows of H and four of I, bf16."""
        _, double, hidden = self._local.w1.shape
        return self._routes * (3 * hidden + 2 * double) * 2

    def __call__(self) -> Tensor:
        """Weighted sum of each row's local experts, bf16 [M, H]."""
        from distbench.experts.triton.launch import Weights, sort  # noqa: PLC0415 - loads Triton

        batch, local = self._batch, self._local
        rows = ExpertInput(batch.hidden, None, batch.weights, batch.ids, self._live)
        placed = sort(rows, Weights(local.w1, local.w2, None, None, local.mask), 128)
        first, count = placed.experts.view(3, placed.local)[:2, : self._w1.shape[0]]
        ends = first + count
        order = placed.order[: self._routes]
        if not self._told:
            order = torch.where(self._number < ends[-1], order, 0)
        source = order // batch.ids.shape[1]
        both = functional.grouped_mm(batch.hidden[source], self._w1, offs=ends)
        gate, up = both.chunk(2, dim=1)
        result = functional.grouped_mm(functional.silu(gate) * up, self._w2, offs=ends)
        weighted = result * batch.weights.view(-1)[order].unsqueeze(1).bfloat16()
        if not self._told:
            weighted.masked_fill_((self._number >= ends[-1]).unsqueeze(1), 0)
        return torch.zeros_like(batch.hidden).index_add_(0, source, weighted)
