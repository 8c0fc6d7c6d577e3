"""All inputs of a case's layer, and the expected outputs: any rank computes any rank's share."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from distbench.utils.amd_arch import Fp8Format
from distbench.workload import exact, gaussian
from distbench.workload.batch import TokenBatch
from distbench.workload.bits import Device
from distbench.workload.blind_spots import blind_spots
from distbench.workload.exact_bias import biases
from distbench.workload.exact_plan import ExactPlan, Intermediate, plan_exact
from distbench.workload.formula import Formula
from distbench.workload.numerics import Numerics
from distbench.workload.oracle import expert_rows, returned_rows
from distbench.workload.padding import PaddedNumerics
from distbench.workload.quantize import fp8_dtype, quantize_fp8_blocks
from distbench.workload.recorded_tokens import recorded_hidden
from distbench.workload.routing import are_local, recorded_weights, token_keys
from distbench.workload.routing_spec import ExpertGroup, Routing, Slots, check_routing, parse_routing
from distbench.workload.slots import logical_experts, route_to_slots
from distbench.workload.table import Span, routing_table, span_of

DispatchDtype = Literal["bf16", "fp8"]


class Workload:
    """One layer's inputs under one routing, on one device. Every call returns new tensors.

    The tokens of a small case are made once, all together; calls copy rows of them.
    """

    def __init__(  # noqa: PLR0913 - the parts of a workload
        self,
        numerics: Numerics,
        slots: Slots,
        routing: Routing,
        *,
        seed: int,
        tokens_per_rank: tuple[int, ...],
        hidden_size: int,
        dispatch_dtype: DispatchDtype,
        fp8: torch.dtype,
        device: Device,
        span: Span | None = None,
    ) -> None:
        """Keep the parts; `make_workload` checks them first.

        `hidden_size` counts its pad. `fp8` is the device's fp8 type. `span` are the tokens that are made together; None
        for none.
        """
        self.numerics = numerics
        self.slots = slots
        self.group = slots.placed
        self.routing = routing
        self.tokens_per_rank = tokens_per_rank
        self.device = torch.device(device)
        self.seed = seed
        self.hidden_size = hidden_size
        self.fp8 = fp8
        self._quantised = dispatch_dtype == "fp8"
        self._span = span
        self._table: TokenBatch | None = None

    @property
    def blind_spots(self) -> list[str]:
        """Return a sentence for each kind of damage that exact inputs cannot show; empty for gaussian inputs."""
        plan = _plan_of(self.numerics)
        return [] if plan is None else blind_spots(plan, self.slots)

    @property
    def experts_per_rank(self) -> int:
        """Local experts El; rank r holds [r * El, (r + 1) * El)."""
        return self.group.experts_per_rank

    def tokens(self, rank: int, index: Tensor | None = None) -> TokenBatch:
        """Return tokens of any rank: all of them, or those with numbers `index` int64 [n]."""
        if index is None:
            index = torch.arange(self.tokens_per_rank[rank], device=self.device)
        return self.token_rows(torch.full_like(index, rank), index)

    def experts_of(self, source_ranks: Tensor, source_tokens: Tensor) -> Tensor:
        """Return the experts of any ranks' tokens, int64 [m] each: int32 [m, k]."""
        return self._route(source_ranks.to(self.device), source_tokens.to(self.device))

    def routing_of(self, rank: int, count: int) -> Tensor:
        """Return the experts of the first `count` tokens of any rank: int32 [count, k]."""
        tokens = torch.arange(count, device=self.device)
        return self._route(torch.full_like(tokens, rank), tokens)

    def token_rows(self, source_ranks: Tensor, source_tokens: Tensor) -> TokenBatch:
        """Return tokens of any ranks as they must arrive, a row for each pair of rank and token, int64 [m] each."""
        ranks, tokens = source_ranks.to(self.device), source_tokens.to(self.device)
        places = None if self._span is None else self._span.places(ranks, tokens)
        if self._span is None or places is None:
            return self._made(ranks, tokens, self._route(ranks, tokens))
        return self._rows(self._span, places)

    def _rows(self, span: Span, places: Tensor) -> TokenBatch:
        """Return copies of some rows of the table."""
        if self._table is None:
            self._table = self._made(*span.everyone(self.device), self._routing(span))
        hidden, scales, weights, ids = self._table
        scales = None if scales is None else scales.index_select(0, places)
        return TokenBatch(
            hidden.index_select(0, places), scales, weights.index_select(0, places), ids.index_select(0, places)
        )

    def _made(self, ranks: Tensor, tokens: Tensor, ids: Tensor) -> TokenBatch:
        """Make the tokens of any ranks, int64 [m] each, with experts `ids` [m, k]."""
        keys = token_keys(ranks, tokens)
        recorded = self._recorded_hidden(keys)
        hidden, scales = recorded or (self.numerics.hidden_states(keys, self._logical(ids)), None)
        if self._quantised and scales is None:
            hidden, scales = quantize_fp8_blocks(hidden, self.fp8)
        return TokenBatch(hidden, scales, self._routing_weights(keys), ids)

    def _recorded_hidden(self, keys: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """Return recorded hidden states, and scales of fp8, of the tokens with keys int64 [m]; None for generated ones.

        Exact inputs keep their own, of which the right bits are known.
        """
        return None if _plan_of(self.numerics) is not None else recorded_hidden(self.routing, keys, self.hidden_size)

    @property
    def recorded(self) -> bool:
        """Whether the hidden states are recorded ones, of which no distribution is known."""
        return self._recorded_hidden(torch.empty(0, dtype=torch.int64, device=self.device)) is not None

    def _routing_weights(self, keys: Tensor) -> Tensor:
        """Weights of the tokens with keys int64 [m]: float32 [m, k + N], those of routed experts recorded if there are.

        Exact sums and probes take 1 and 1/2: 1 is a weight from the token's middle one up, which keeps their order.
        """
        made, recorded = self.numerics.routing_weights(keys), recorded_weights(self.routing, keys)
        if recorded is None:
            return made
        plan = _plan_of(self.numerics)
        if plan is not None:
            middle = recorded.sort(dim=1).values[:, recorded.shape[1] // 2].unsqueeze(1)
            recorded = torch.where(recorded >= middle, 1.0, 1.0 / plan.weight_ratio)
        return torch.cat([recorded, made[:, recorded.shape[1] :]], dim=1)

    def local_weights(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return w1 bf16 [El, 2I, H], gate rows before up rows, and w2 bf16 [El, H, I] of the experts of `rank`."""
        return self.numerics.dense_weights(self._local_experts(rank))

    def local_biases(self, rank: int) -> tuple[Tensor, Tensor] | None:
        """Return bias1 float32 [El, 2I] and bias2 float32 [El, H] of the experts of `rank`, or None."""
        return self.numerics.biases(self._local_experts(rank))

    def expected(self, batch: TokenBatch) -> Tensor | None:
        """Return combine's expected output for `batch`, bit for bit: bf16 [n, H]; None where bits may vary."""
        total = self._expert_rows(batch)
        return None if total is None else self.numerics.returned_rows(total)

    def returned_rows(self, rows: Tensor) -> Tensor:
        """Return expert rows [m, H] as combine adds them: after the trip back, where inputs are exact."""
        return self.numerics.returned_rows(rows)

    def expected_rows(self, rank: int, batch: TokenBatch) -> Tensor | None:
        """Return the expected expert rows of `rank` for its received rows: bf16 [m, H]; None where bits may vary."""
        local = are_local(batch.ids, rank, self.experts_per_rank)
        return self._expert_rows(batch._replace(ids=batch.ids.masked_fill(~local, -1)))

    def arriving(self, rank: int) -> tuple[Tensor, Tensor, TokenBatch] | None:
        """Return the source ranks, tokens and rows that `rank` receives, sorted; None where the case is large."""
        span = self._span
        if span is None or not span.tokens:
            return None
        ranks, tokens = span.everyone(self.device)
        here = are_local(self._routing(span), rank, self.experts_per_rank).any(1)
        if min(self.tokens_per_rank) < span.tokens:
            here &= tokens < torch.tensor(self.tokens_per_rank, device=self.device)[ranks]
        places = here.nonzero().flatten()
        return ranks.index_select(0, places), tokens.index_select(0, places), self._rows(span, places)

    def expected_together(
        self, rank: int, own: TokenBatch, sources: Tensor, received: TokenBatch
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return `expected` of the tokens `own` of `rank`, and `expected_rows` of the rows `received` there.

        The rows are all that arrive, with source ranks `sources` int64 [m], as `arriving` returns them. Local experts'
        shares of own tokens are among them. Adding them to the others' loses nothing: sums of both
        parts together are exact in bf16, and of a probe one part is zero.
        """
        if _plan_of(self.numerics) is None:
            return None, None
        local = torch.where(are_local(received.ids, rank, self.experts_per_rank), received.ids, -1)
        here, count = are_local(own.ids, rank, self.experts_per_rank), len(own.ids)
        scales = None
        if own.scales is not None and received.scales is not None:
            scales = torch.cat([own.scales, received.scales])
        hidden, weights = torch.cat([own.hidden, received.hidden]), torch.cat([own.weights, received.weights])
        both = TokenBatch(hidden, scales, weights, torch.cat([own.ids.masked_fill(here, -1), local]))
        rows = self._expert_rows(both)
        assert rows is not None  # noqa: S101 - there is a plan
        tokens, rows = rows[:count], rows[count:]
        if len(rows):
            sent = here.any(1)
            places = sent.cumsum(0) + ((sources < rank).sum() - 1)
            tokens += rows.index_select(0, places.clamp_(min=0)).masked_fill_(~sent.unsqueeze(1), 0.0)
        return self.numerics.returned_rows(tokens), rows

    def _route(self, ranks: Tensor, tokens: Tensor) -> Tensor:
        places = None if self._span is None else self._span.places(ranks, tokens)
        if self._span is None or places is None:
            return route_to_slots(self.routing, self.slots, seed=self.seed, ranks=ranks, tokens=tokens)
        return self._routing(self._span).index_select(0, places)

    def _routing(self, span: Span) -> Tensor:
        return routing_table(self.routing, self.slots, self.seed, span, self.device)

    def _logical(self, ids: Tensor) -> Tensor:
        """Return the logical experts of physical ones; ids of no expert name none."""
        if not self.slots.shared and not self.slots.experts:
            return ids
        valid = (ids >= 0) & (ids < self.group.num_experts)
        return torch.where(valid, logical_experts(self.slots, self.device)[ids.masked_fill(~valid, 0).long()], -1)

    def _expert_rows(self, batch: TokenBatch) -> Tensor | None:
        """Return the sums over all experts of a batch with physical ids."""
        return self.numerics.expert_rows(batch._replace(ids=self._logical(batch.ids)), range(self.slots.logical))

    def _local_experts(self, rank: int) -> Tensor:
        """Return the logical experts in the slots of `rank`, int64 [El]."""
        return logical_experts(self.slots, self.device).view(self.group.ep_size, -1)[rank]


class ExactNumerics(NamedTuple):
    """The `Numerics` of bitwise checks; see distbench.workload.exact."""

    plan: ExactPlan
    seed: int

    def hidden_states(self, keys: Tensor, ids: Tensor) -> Tensor:
        """See `Numerics.hidden_states`."""
        return exact.hidden_states(self.plan, self.seed, keys, ids)

    def routing_weights(self, keys: Tensor) -> Tensor:
        """See `Numerics.routing_weights`."""
        return exact.routing_weights(self.plan, self.seed, keys)

    def dense_weights(self, experts: Tensor) -> tuple[Tensor, Tensor]:
        """See `Numerics.dense_weights`."""
        return exact.dense_weights(self.plan, self.seed, experts)

    def biases(self, experts: Tensor) -> tuple[Tensor, Tensor] | None:
        """See `Numerics.biases`."""
        return biases(self.plan, self.seed, experts) if self.plan.formula.bias else None

    def expert_rows(self, batch: TokenBatch, experts: range) -> Tensor:
        """See `Numerics.expert_rows`."""
        return expert_rows(self.plan, self.seed, batch, experts)

    def returned_rows(self, rows: Tensor) -> Tensor:
        """See `Numerics.returned_rows`."""
        return returned_rows(self.plan, rows)


class GaussianNumerics(NamedTuple):
    """The `Numerics` of realistic values; see distbench.workload.gaussian."""

    hidden_size: int
    intermediate_size: int
    topk: int
    seed: int
    bias: bool = False
    shared: int = 0

    def hidden_states(self, keys: Tensor, ids: Tensor) -> Tensor:
        """See `Numerics.hidden_states`; the experts are ignored."""
        del ids
        return gaussian.hidden_states(self.seed, keys, self.hidden_size)

    def routing_weights(self, keys: Tensor) -> Tensor:
        """See `Numerics.routing_weights`."""
        return gaussian.routing_weights(self.seed, keys, self.topk, self.shared)

    def dense_weights(self, experts: Tensor) -> tuple[Tensor, Tensor]:
        """See `Numerics.dense_weights`."""
        return gaussian.dense_weights(self.hidden_size, self.intermediate_size, self.seed, experts)

    def biases(self, experts: Tensor) -> tuple[Tensor, Tensor] | None:
        """See `Numerics.biases`."""
        return gaussian.biases(self.hidden_size, self.intermediate_size, self.seed, experts) if self.bias else None

    def expert_rows(self, batch: TokenBatch, experts: range) -> None:
        """See `Numerics.expert_rows`."""

    def returned_rows(self, rows: Tensor) -> Tensor:
        """See `Numerics.returned_rows`; the bits after a quantised trip back are unknown."""
        return rows


def _plan_of(numerics: Numerics) -> ExactPlan | None:
    """Return the plan of exact inputs, padded or not; None for others."""
    inner = numerics.inner if isinstance(numerics, PaddedNumerics) else numerics
    return inner.plan if isinstance(inner, ExactNumerics) else None


def make_workload(  # noqa: PLR0913 - a case's keys
    *,
    numerics: Literal["exact", "gaussian"],
    hidden_size: int,
    intermediate_size: int,
    num_experts: int,
    topk: int,
    ep_size: int,
    seed: int,
    routing: str,
    tokens_per_rank: tuple[int, ...],
    dispatch_dtype: DispatchDtype,
    fp8_format: Fp8Format = "e4m3fn",
    combine_quant: str = "none",
    intermediate: Intermediate = "bf16",
    formula: Formula = Formula(),  # noqa: B008 - frozen
    hidden_pad: int = 0,
    intermediate_pad: int = 0,
    shared_experts: int = 0,
    placement: tuple[int, ...] = (),
    replica_choice: str = "dynamic",
    dropped_slots: float = 0.0,
    dropped_tokens: float = 0.0,
    device: Device,
) -> Workload:
    """Return the inputs that a case describes; `intermediate` is the dtype that experts store between their products.

    `formula` is what the experts compute; both sizes count their pads. `placement` is as in `Slots.experts`.

    Raises:
        InvalidCase: the routing does not fit the ranks, or the shape cannot be exact.
    """
    group = ExpertGroup(ep_size, num_experts, topk)
    slots = Slots(group, placement, shared_experts, replica_choice, dropped_slots, dropped_tokens)
    chosen = parse_routing(routing)
    check_routing(chosen, slots.group, slots)
    live = hidden_size - hidden_pad, intermediate_size - intermediate_pad
    source: Numerics = GaussianNumerics(*live, slots.group.topk, seed, formula.bias, slots.shared)
    if numerics == "exact":
        experts = slots.placed.topk, dispatch_dtype, slots.logical
        plan = plan_exact(*live, *experts, combine_quant, fp8_format, intermediate, formula)
        source = ExactNumerics(plan, seed)
    if hidden_pad or intermediate_pad:
        source = PaddedNumerics(source, live[0], hidden_pad, intermediate_pad)
    return Workload(
        source,
        slots,
        chosen,
        seed=seed,
        tokens_per_rank=tokens_per_rank,
        hidden_size=hidden_size,
        dispatch_dtype=dispatch_dtype,
        fp8=fp8_dtype(fp8_format),
        device=device,
        span=span_of(tokens_per_rank, max(hidden_size, slots.logical), torch.device(device)),
    )
