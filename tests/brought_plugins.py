"""Transports and experts of another package: written against `distbench.plugins` alone, most of them broken."""

from __future__ import annotations

import time
from typing import Annotated, Any, ClassVar

import msgspec
import torch
from torch import Tensor

from distbench.plugins import (
    Call,
    Caller,
    CallerContext,
    CallerText,
    Dispatched,
    ExpertInput,
    ExpertsAround,
    ExpertsContext,
    ExpertWeights,
    Fault,
    KernelChoice,
    Plugin,
    Roundings,
    Steps,
    TokenBatch,
    Transport,
    TransportAround,
    TransportContext,
    WholeTransport,
    collective_transport,
    reference_experts,
    whole,
)


class Options(msgspec.Struct, frozen=True):
    """Options of `OPTIONED`."""

    factor: Annotated[int, msgspec.Meta(ge=1, le=8)] = 1


class Alone(WholeTransport):
    """A transport of bf16 rows for one rank."""

    def __init__(self, context: TransportContext) -> None:
        self.capacity = context.case.capacity
        self._rows = context.like.hidden.shape[0]
        hidden, weights, ids = (
            part.new_zeros(self.capacity, part.shape[1])
            for part in (context.like.hidden, context.like.weights, context.like.ids)
        )
        self._received = Dispatched(hidden, None, weights, ids, torch.zeros(1, dtype=torch.int32))

    def dispatch(self, batch: TokenBatch) -> Dispatched:
        for mine, sent in zip(self._received.fields(), (batch.hidden, batch.weights, batch.ids), strict=True):
            mine[: len(sent)] = sent
        self._received.total_recv.fill_(len(batch.ids))
        return self._received

    def combine(self, expert_out: Tensor, ids: Tensor) -> Tensor:
        return expert_out[: len(ids)].clone()

    def sources(self) -> Tensor:
        return torch.stack([torch.zeros(self._rows, dtype=torch.int64), torch.arange(self._rows)], dim=1)


def raises_in_make(context: TransportContext) -> Any:
    raise ValueError(context.rank)


def makes_nothing(_: TransportContext) -> Any:
    return None


class WithoutCapacity(Alone):
    def __init__(self, context: TransportContext) -> None:
        super().__init__(context)
        del self.capacity


class NoFacts(Alone):
    facts = None  # type: ignore[assignment]


class TensorFacts(Alone):
    def about(self) -> dict[str, Any]:
        return {"alone": {"rows": torch.zeros(1)}}


class RaisesInDispatch(Alone):
    def dispatch(self, batch: TokenBatch) -> Dispatched:
        raise OSError(len(batch.ids))


class ReturnsTuple(Alone):
    def dispatch(self, batch: TokenBatch) -> Dispatched:
        return tuple(super().dispatch(batch))  # type: ignore[return-value]


class ReturnsNumber(Alone):
    def dispatch(self, batch: TokenBatch) -> Dispatched:
        return super().dispatch(batch)._replace(total_recv=len(batch.ids))  # type: ignore[arg-type]


class ReturnsScales(Alone):
    def dispatch(self, batch: TokenBatch) -> Dispatched:
        return super().dispatch(batch)._replace(scales=torch.ones(self.capacity, 2))


class ShortBuffer(Alone):
    def dispatch(self, batch: TokenBatch) -> Dispatched:
        found = super().dispatch(batch)
        return found._replace(hidden=found.hidden[: len(batch.ids)])


class WideWeights(Alone):
    def dispatch(self, batch: TokenBatch) -> Dispatched:
        found = super().dispatch(batch)
        return found._replace(weights=found.weights.double())


class ElsewhereIds(Alone):
    def dispatch(self, batch: TokenBatch) -> Dispatched:
        found = super().dispatch(batch)
        return found._replace(ids=found.ids.to("meta"))


class Moves(Alone):
    def dispatch(self, batch: TokenBatch) -> Dispatched:
        self._received = self._received._replace(ids=self._received.ids.clone())
        return super().dispatch(batch)


class FlatSources(Alone):
    def sources(self) -> Tensor:
        return super().sources().flatten()


class RaisesInSources(Alone):
    def sources(self) -> Tensor:
        raise KeyError(self.capacity)


class RaisesInCombine(Alone):
    def combine(self, expert_out: Tensor, ids: Tensor) -> Tensor:
        raise RuntimeError(len(expert_out) + len(ids))


class NarrowTokens(Alone):
    def combine(self, expert_out: Tensor, ids: Tensor) -> Tensor:
        return super().combine(expert_out, ids)[:, :-1]


class Float32Tokens(Alone):
    def combine(self, expert_out: Tensor, ids: Tensor) -> Tensor:
        return super().combine(expert_out, ids).float()


class ElsewhereTokens(Alone):
    def combine(self, expert_out: Tensor, ids: Tensor) -> Tensor:
        return super().combine(expert_out, ids).to("meta")


class NoTokens(Alone):
    def combine(self, expert_out: Tensor, ids: Tensor) -> Tensor:  # noqa: ARG002 - it returns nothing
        return None  # type: ignore[return-value]


class Multiplies(TransportAround):
    """A combine that is wrong on rank 1 by a factor, right with a factor of 1."""

    def __init__(self, context: TransportContext) -> None:
        super().__init__(collective_transport(context))
        self._rank, self._factor = context.rank, context.options.factor

    def combine_recv(self) -> Tensor:
        tokens = super().combine_recv()
        return tokens * self._factor if self._rank == 1 else tokens


class LosesRow(TransportAround):
    """A dispatch that overwrites rank 0's first received row by its second."""

    def __init__(self, context: TransportContext) -> None:
        super().__init__(collective_transport(context))
        self._rank = context.rank

    def dispatch_recv(self) -> Dispatched:
        found = super().dispatch_recv()
        if self._rank == 0:
            found.hidden[0] = found.hidden[1]
        return found


class LocalSlots(TransportAround):
    """A dispatch that moves slots of the receiver's experts alone, and a combine that is wrong on rank 1."""

    def __init__(self, context: TransportContext) -> None:
        super().__init__(collective_transport(context))
        self.local_slots = True
        self._context = context

    def dispatch_recv(self) -> Dispatched:
        found = super().dispatch_recv()
        elsewhere = found.ids.div(self._context.case.experts_per_rank, rounding_mode="floor") != self._context.rank
        found.ids.masked_fill_(elsewhere, -1)
        found.weights.masked_fill_(elsewhere, 0.0)
        return found

    def combine_recv(self) -> Tensor:
        return super().combine_recv() * (1 + self._context.rank)


class ZeroesSent(TransportAround):
    """A dispatch that zeroes the rows that rank 1 sends, where they lie."""

    def __init__(self, context: TransportContext) -> None:
        super().__init__(collective_transport(context))
        self._rank = context.rank

    def dispatch_send(self, batch: TokenBatch) -> None:
        if self._rank == 1:
            batch.hidden.zero_()
        super().dispatch_send(batch)


class Stands(Multiplies):
    """A combine that does not return on rank 1."""

    def combine_recv(self) -> Tensor:
        if self._rank == 1:
            time.sleep(600)
        return super().combine_recv()


OPTIONED = Plugin(make=Multiplies, name="optioned", version="1.2", options=Options)
STANDS = Plugin(make=Stands, options=Options)
ON_DEVICES = Plugin(make=Multiplies, devices=("cuda",), options=Options)
NO_FP8 = Plugin(make=Alone, dtypes=("bf16",), zero_tokens=False)
NOT_CALLABLE = 5


class Same(ExpertsAround):
    """The reference experts, as a kernel that adds atomically whatever the number of rows."""

    def __init__(self, context: ExpertsContext) -> None:
        super().__init__(reference_experts(context))
        self._columns = context.case.hidden_size

    def selection(self, rows: int) -> KernelChoice:
        return KernelChoice.named(rows, "same", varies=True)

    def roundings(self, choice: KernelChoice) -> Roundings:
        return Roundings(sums="bf16" if choice.stage2_mode == "atomic" else "float32")


def raises_in_make_of_experts(context: ExpertsContext) -> Any:
    raise ValueError(context.case.seed)


class TensorAbout(Same):
    def about(self) -> dict[str, Any]:
        return {"same": {"rows": torch.zeros(1)}}


class ChoosesNothing(Same):
    def selection(self, rows: int) -> KernelChoice:  # noqa: ARG002 - it chooses nothing
        return None  # type: ignore[return-value]


class ChoosesForOthers(Same):
    def selection(self, rows: int) -> KernelChoice:
        return super().selection(rows + 1)


class NamesRoundings(Same):
    def roundings(self, choice: KernelChoice) -> Roundings:  # noqa: ARG002 - it returns a name
        return "bf16"  # type: ignore[return-value]


class RaisesInCall(Same):
    def __call__(self, given: ExpertInput, weights: ExpertWeights) -> Tensor:
        raise RuntimeError(given.rows + len(weights.w1))


class RaisesInWarmUp(Same):
    def warm_up(self, weights: ExpertWeights, rows: tuple[int, ...]) -> None:
        raise RuntimeError(len(weights.w1) + len(rows))


class ReturnsLiveRows(Same):
    def __call__(self, given: ExpertInput, weights: ExpertWeights) -> Tensor:
        return super().__call__(given, weights)[: int(given.num_local_tokens)]


class ReturnsFloat32(Same):
    def __call__(self, given: ExpertInput, weights: ExpertWeights) -> Tensor:
        return super().__call__(given, weights).float()


class ReturnsElsewhere(Same):
    def __call__(self, given: ExpertInput, weights: ExpertWeights) -> Tensor:
        return super().__call__(given, weights).to("meta")


class ReturnsNothing(Same):
    def __call__(self, given: ExpertInput, weights: ExpertWeights) -> Tensor:  # noqa: ARG002 - it returns nothing
        return None  # type: ignore[return-value]


class WritesWeights(ExpertsAround):
    """Experts that round their weights in place, so that they compute with what they hold."""

    def __init__(self, context: ExpertsContext) -> None:
        super().__init__(reference_experts(context))

    def __call__(self, given: ExpertInput, weights: ExpertWeights) -> Tensor:
        weights.w2.view(torch.int16).bitwise_and_(-16)
        return super().__call__(given, weights)


class WritesMask(ExpertsAround):
    """Experts that leave another mask."""

    def __init__(self, context: ExpertsContext) -> None:
        super().__init__(reference_experts(context))

    def __call__(self, given: ExpertInput, weights: ExpertWeights) -> Tensor:
        rows = super().__call__(given, weights)
        weights.mask.fill_(1)
        return rows


class InPlace(ExpertsAround):
    """Experts whose right rows replace the rows that they were given."""

    def __init__(self, context: ExpertsContext) -> None:
        super().__init__(reference_experts(context))

    def __call__(self, given: ExpertInput, weights: ExpertWeights) -> Tensor:
        given.hidden.copy_(super().__call__(given, weights))
        return given.hidden


class WritesCount(ExpertsAround):
    """Experts that leave no live row."""

    def __init__(self, context: ExpertsContext) -> None:
        super().__init__(reference_experts(context))

    def __call__(self, given: ExpertInput, weights: ExpertWeights) -> Tensor:
        rows = super().__call__(given, weights)
        given.num_local_tokens.zero_()
        return rows


class Late(TransportAround):
    """A transport whose first row is there only once the experts have read it."""

    def __init__(self, context: TransportContext) -> None:
        super().__init__(collective_transport(context))

    def dispatch_recv(self) -> Dispatched:
        self._received = super().dispatch_recv()
        self._row = self._received.hidden[0].clone()
        self._received.hidden[0] = 0
        return self._received

    def sources(self) -> Tensor:
        self._received.hidden[0] = self._row
        return super().sources()


class KeepsIds(TransportAround):
    """A transport whose combine adds by the ids of its first call."""

    def __init__(self, context: TransportContext) -> None:
        super().__init__(collective_transport(context))
        self._ids: Tensor | None = None

    def combine_send(self, expert_out: Tensor, ids: Tensor) -> None:
        self._ids = ids.clone() if self._ids is None else self._ids
        super().combine_send(expert_out, self._ids)


class OneBuffer(TransportAround):
    """A transport that returns the tokens of all its calls in the same memory; wrong in the arm `wrong`."""

    wrong = ""

    def __init__(self, context: TransportContext) -> None:
        super().__init__(collective_transport(context))
        self._session = context.session
        self._tokens: Tensor | None = None

    def combine_recv(self) -> Tensor:
        tokens = super().combine_recv()
        self._tokens = torch.empty_like(tokens) if self._tokens is None else self._tokens
        return self._tokens.copy_(tokens * 2 if self._session.heartbeat.arm == self.wrong else tokens)


class OneBufferPadded(OneBuffer):
    wrong = "padded"


class OneBufferTruncated(OneBuffer):
    wrong = "truncated"


class Unweighted(Same):
    """Experts that apply no routing weight."""

    def __call__(self, given: ExpertInput, weights: ExpertWeights) -> Tensor:
        return super().__call__(given._replace(weights=given.weights.sign()), weights)


class Swapped(Same):
    """Experts that compute with the gate in place of up."""

    def __call__(self, given: ExpertInput, weights: ExpertWeights) -> Tensor:
        half = weights.w1.shape[1] // 2
        return super().__call__(given, weights._replace(w1=weights.w1.roll(half, 1)))


SAME = Plugin(make=Same, name="same", version="3")


class Rule(msgspec.Struct, frozen=True):
    """Option of `SPOILS` and `SPOILS_ROWS`: the rule of the suite conformance that is broken."""

    rule: str = ""


class Spoils(TransportAround):
    """A transport that is wrong only where the case of one rule of conformance looks."""

    def __init__(self, context: TransportContext) -> None:
        super().__init__(collective_transport(context))
        self._context = context
        self._calls = 0
        self._first: Tensor | None = None

    def dispatch_recv(self) -> Dispatched:
        found = super().dispatch_recv()
        if self._context.options.rule == "fp8" and found.scales is not None:
            found.scales.copy_(found.scales.roll(1, 1))
        return found

    def combine_recv(self) -> Tensor:
        tokens = super().combine_recv()
        self._calls += 1
        self._first = tokens.clone() if self._first is None else self._first
        if self._context.options.rule == "no-tokens" and not len(tokens):
            return tokens.new_zeros(1, tokens.shape[1])
        if self._context.options.rule == "other-contents":
            return self._first
        return tokens * 2 if self._spoilt() else tokens

    def _spoilt(self) -> bool:
        case, counts, ids = self._context.case, self._context.counts, self._context.like.ids
        per_rank = case.experts_per_rank
        ranks = ids.div(per_rank, rounding_mode="floor")
        spoilt: dict[str, bool] = {
            "one-token": len(ids) == 1,
            "zero-tokens": 0 in case.tokens and any(case.tokens),
            "uneven-tokens": len(set(case.tokens)) > 1 and 0 not in case.tokens,
            "own-rank-only": not int(counts.sum() - counts.diag().sum()),
            "all-to-one-rank": bool((counts.sum(0) == 0).any() and counts.any()),
            "shared-ranks": any(len(set(row)) < len(row) for row in ranks.tolist()),
            "capacity": bool((counts.sum(0) == case.capacity).any()),
            "many-calls": self._calls > 20,
            "odd-widths": bool(case.hidden_size % 128),
            "dropped-slots": bool((ids < 0).any()),
            "shared-experts": case.shared_experts > 0,
        }
        return spoilt.get(self._context.options.rule, False)


class SpoilsRows(ExpertsAround):
    """Experts that are wrong where they are given fewer rows than the receive buffer has."""

    def __init__(self, context: ExpertsContext) -> None:
        super().__init__(reference_experts(context))
        self._capacity = context.case.capacity

    def __call__(self, given: ExpertInput, weights: ExpertWeights) -> Tensor:
        rows = super().__call__(given, weights)
        return rows if given.rows == self._capacity else rows * 2


SPOILS = Plugin(make=Spoils, options=Rule)


class Doubled(Fault):
    """Combine's tokens are doubled."""

    name, stage, bug = "doubled", "combine", "a public report"
    options: ClassVar = {"factor": whole(2, 1, 8)}

    def combined(self, tokens: Tensor) -> Tensor:
        self.hits += 1
        return tokens * int(self.chosen["factor"])


class Nameless(Fault):
    """A fault without a name."""


class Plain(Caller):
    """Production's code in three lines: it cuts at the limit, and calls the experts."""

    text = CallerText(package="acme", version="1.2", origin="here", files=("acme.py",), sha256="ab" * 32)

    def __init__(self, context: CallerContext) -> None:
        self._limit, self._experts = context.setting.limit, context.experts

    def run(self, batch: TokenBatch, weights: ExpertWeights, transport: Transport, steps: Steps) -> Tensor:
        found = transport.dispatch(batch)
        steps.dispatched()
        rows = self._rows(len(found.ids))
        given = ExpertInput(found.hidden[:rows], None, found.weights[:rows], found.ids[:rows], found.total_recv)
        steps.given(given)
        made = self._experts(given, weights)
        steps.made(found, Call(given, made, {}))
        return transport.combine(made, batch.ids)

    def _rows(self, capacity: int) -> int:
        return self._limit or capacity


class CutsNothing(Plain):
    """A caller that gives its experts the whole receive buffer, whatever the limit."""

    def _rows(self, capacity: int) -> int:
        return capacity


CALLER_ON_DEVICES = Plugin(make=Plain, devices=("cuda",))


class Anonymous(Plain):
    """A caller whose text has no digest."""

    text = CallerText(package="acme", version="1.2", origin="here", files=(), sha256="")
