"""What the passes of one case on one rank made, and this rank's observation of it."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import torch
from torch import Tensor

from distbench.callers.text import CallerUse
from distbench.case.stages import SUB_BATCHES, Arm, Stage
from distbench.distributed.choose import choose_exchange
from distbench.distributed.session import Session
from distbench.experts.base import ExpertInput
from distbench.pipeline.arm_errors import ArmErrors, Made
from distbench.pipeline.parts import Parts
from distbench.pipeline.production_rows import production_rows
from distbench.pipeline.recorder import Finished, PartRecorder
from distbench.transport.base import Dispatched
from distbench.utils.devices import DeviceState
from distbench.utils.process import peak_bytes
from distbench.verify.changes import Looks, WeightsWatch
from distbench.verify.combine_check import CombineChecker, Combined, Own, Rider
from distbench.verify.combine_model import OwnSlots, Returned, together
from distbench.verify.difference_map import differing_cells
from distbench.verify.excuses import adds_atomically, tolerance
from distbench.verify.gather import Outputs
from distbench.verify.losses import Losses, surviving, survivors
from distbench.verify.pairs import pair_name, pairs_of
from distbench.verify.records import (
    LISTED_TOKENS,
    NO_DIFFERENCE,
    ORACLE,
    ArmError,
    Divergence,
    LayerGraph,
    LostRows,
    Observation,
    Replay,
    ResolvedCase,
    RowComparison,
    SubBatchCounts,
    Timed,
    TokenCounts,
)
from distbench.verify.row_compare import compare_rows, relative_error, same_bits, same_bits_each, tensor_digest
from distbench.verify.stage_check import Received, Span, StageChecker, counts_of, foreseen

if TYPE_CHECKING:
    from distbench.callers.base import Call


class Measured(NamedTuple):
    """What was measured beside the outputs: see the fields of `Observation`."""

    durations_us: dict[str, dict[str, list[float]]]
    timed: dict[str, Timed]
    device_state: DeviceState | None
    replays: list[Replay]
    layer_graphs: list[LayerGraph]


class ArmInspector(NamedTuple):
    """What an observer sees of the passes of one arm; see `Inspector`."""

    observer: Observer
    arm: str

    def arrived(self, dispatched: Dispatched, sub_batch: int = 0) -> None:
        """See `Inspector.arrived`."""
        self.observer.looks(sub_batch).arrived(dispatched)

    def given(self, given: ExpertInput, sub_batch: int = 0) -> None:
        """See `Inspector.given`."""
        self.observer.looks(sub_batch).given(given)

    def __call__(
        self, sources: Tensor, dispatched: Dispatched, given: ExpertInput, expert_out: Tensor, sub_batch: int = 0
    ) -> None:
        """See `Inspector.__call__`."""
        self.observer.inspect(self.arm, sources, dispatched, given, expert_out, sub_batch)


class Observer:
    """Checks each pass and each repeat, and keeps the outputs and findings to report.

    The first padded pass is the baseline of all repeats. The other arms are kept from the first repeat in which
    anything is wrong on any rank, else from the last repeat.
    """

    def __init__(
        self,
        session: Session,
        resolved: ResolvedCase,
        parts: Parts,
        counts: Tensor,
        recorder: PartRecorder | None = None,
    ) -> None:
        """`counts` int64 [batches, W, W]: rows that rank i sends to rank j, as agreed, in each sub-batch or in the one.

        `recorder` keeps the same passes.
        """
        self.outputs: dict[str, Tensor] = {}
        self.kernels: dict[str, dict[str, Any]] = {}
        self.given: ExpertInput | None = None
        self._session, self._resolved, self._parts, self._recorder = session, resolved, parts, recorder
        self._expected, received = foreseen(parts.workload, session.rank, parts.batch)
        self._stages = _checkers(session.rank, resolved, parts, counts, received)
        slots = OwnSlots(parts.batch.ids, parts.workload.group, parts.transport.sum_order)
        exchange = choose_exchange(session.group, session.shared, counts.sum(0), session.device)
        own = Own(session.rank, slots, self._expected)
        self._combine = CombineChecker(session, exchange, parts.workload, own, tolerance(resolved.case))
        self._errors = (
            ArmErrors(session, resolved, parts, exchange, slots, received) if self._expected is None else None
        )
        self._weights = WeightsWatch(parts.weights, session.rank)
        self._taken: list[tuple[Tensor, Tensor]] = []
        self._divergences: list[Divergence] = []
        self._lost = LostRows()
        self._losses = Losses(session.group, resolved, session.rank)
        self._without_rows: dict[str, Tensor] = {}
        self._token_counts = TokenCounts()
        self._damaged: set[str] = set()
        self._caller: CallerUse | None = None
        self._beyond: list[Tensor] = []
        self._rows: list[dict[str, int]] = [{} for _ in self._stages]
        self._joined: tuple[list[Returned], Returned] | None = None
        self._wrong = self._settled = False

    def inspector(self, arm: str) -> ArmInspector:
        """The inspector of the passes of `arm`."""
        return ArmInspector(self, arm)

    def looks(self, sub_batch: int) -> Looks:
        """Return the looks at the rows of a sub-batch, or of the whole batch."""
        return self._stages[sub_batch].looks

    def inspect(  # noqa: PLR0913 - the buffers of a pass
        self,
        arm: str,
        sources: Tensor,
        dispatched: Dispatched,
        given: ExpertInput,
        expert_out: Tensor,
        sub_batch: int = 0,
    ) -> None:
        """Check the buffers of a pass of `arm` before combine releases them; see `Inspector`."""
        self.given = given
        self.kernels[arm] = self._kernel(given.rows)
        self._rows[sub_batch][arm] = given.rows
        limit = self._resolved.limit
        if limit is not None and self._resolved.case.policy != "guard":
            self._take_beyond(arm, sources[limit:], sub_batch)
        stages = self._stages[sub_batch]
        counts = counts_of(dispatched, given, stages.looks)
        rows = self._rows_after_cut(arm, dispatched.hidden.shape[0], counts.total)
        cut = stages.check_cut(arm, sources, counts, given, rows)
        for found in [*stages.check_rows(arm, sources, counts, dispatched, given, expert_out), cut]:
            if found is not None and len(self._stages) > 1:
                self._note(msgspec.structs.replace(found, sub_batch=SUB_BATCHES[sub_batch]))
            else:
                self._note(found)
        stages.looks.begin()
        if self._recorder is not None:
            self._recorder.take(arm, sources, given, expert_out, joins=sub_batch > 0)

    def take_call(self, call: Call) -> None:
        """Keep the rows and the arguments that a caller gave to `fused_moe`, in its last pass."""
        assert self._parts.caller is not None  # noqa: S101 - whose call it is
        self._caller = CallerUse(self._parts.caller.text, call.given.rows, call.differing)

    def take(self, arm: str, combined: Tensor) -> None:
        """Keep the tokens of a pass until the repeat ends, to count the wrong ones.

        They are compared with the oracle, else with the arms that run the padded kernel.
        """
        right = self._expected
        if right is None and arm in (Arm.CONTROL, Arm.REPADDED):
            right = self.outputs.get(Arm.PADDED, combined)
        if right is not None:
            self._taken.append((combined, right))

    def share_losses(self) -> dict[str, Tensor]:
        """Tokens, bool [n] by arm, that lost a row to the limit in the passes of this repeat. Collective."""
        return self._losses.share()

    def end_repeat(self, fresh: dict[str, Tensor], lost: dict[str, Tensor]) -> bool:
        """Check combine's output in a repeat; return whether anything is wrong, or differs, on any rank. Collective.

        `fresh` are the tokens of its arms, `lost` those of `share_losses`. In exact inputs combine is correct where
        every token has the oracle's bits.
        """
        self._count_wrong_tokens()
        wrong = bool(self._damaged) or self._differs(fresh)
        made = Made(
            fresh, lost, self._returned, self._unfit, {arm: kernel["rows"] for arm, kernel in self.kernels.items()}
        )
        if self._expected is None or (wrong := self._session.on_any_rank(value=wrong)):
            rider = None if self._errors is None else self._errors.rider(made)
            wrong = self._check_combine(fresh, lost, rider, wrong=wrong)
        self._damaged.clear()
        self._wrong = False
        if self._errors is not None:
            self._errors.measure(made)
        if not self._settled:
            self._keep(fresh, lost, settled=wrong)
        self._token_counts = msgspec.structs.replace(self._token_counts, repeats=self._token_counts.repeats + 1)
        return wrong

    def end(self) -> None:
        """Take the oracle among the outputs, after all passes, look at the weights, and let the recorder end."""
        self._note(self._weights.changed())
        if self._expected is not None:
            self.outputs[ORACLE] = self._expected
        if self._recorder is not None:
            parts = self._parts
            self._recorder.finish(Finished(parts.workload, parts.batch, parts.weights, self.outputs))

    def error_of(self, arm: str, tokens: Tensor) -> ArmError | None:
        """See `ArmErrors.error_of`; None where inputs are exact."""
        return None if self._errors is None else self._errors.error_of(arm, tokens)

    def between(self, arm: str, stage: Stage) -> float | None:
        """See `ErrorChecker.allowed_between`; None where inputs are exact."""
        return None if self._errors is None else self._errors.between(arm, stage)

    def replay_tolerance(self, arm: str) -> float:
        """Distance that a replay of the arm's graph may have from eager experts: 0 where its kernel repeats bits."""
        if self._resolved.case.numerics == "exact" or not adds_atomically(self.kernels[arm]):
            return 0.0
        return self.between(arm, Stage.EXPERTS) or tolerance(self._resolved.case)

    @property
    def replayed_against(self) -> str:
        """What replays of a graph are compared with: the oracle, or the same without a graph."""
        return "eager experts" if self._expected is None else ORACLE

    def take_divergence(self, found: Divergence) -> None:
        """Record a divergence that was found beside the checked passes."""
        self._divergences.append(found)

    def observation(self, made: Outputs, measured: Measured, *, mapped: bool) -> Observation:
        """This rank's observation, after all passes, of all its `outputs` as they were `made`.

        `mapped` says whether it has a map of differing tokens, which a report shows of the first inputs alone.
        """
        session, resolved, parts, outputs = self._session, self._resolved, self._parts, self.outputs
        comparisons = _comparisons(made, outputs)
        return Observation(
            rank=session.rank,
            host=socket.gethostname(),
            device=str(session.device),
            tokens=resolved.traffic.tokens[session.rank],
            total_recv=resolved.traffic.total_recv[session.rank],
            capacity=resolved.traffic.capacity,
            limit=resolved.limit,
            lost=self._lost,
            kernels=self.kernels,
            digests=_digests(made),
            divergences=self._divergences,
            comparisons=comparisons,
            reference=None,
            distance=self._distances(),
            survivors=survivors(made, self._without_rows) if resolved.lossy else None,
            token_counts=self._token_counts,
            injected=parts.injector.hits if parts.injector else {},
            nan_tokens=dict(zip(outputs, made.rows.amax(2).isnan().sum(0).tolist(), strict=True)),
            durations_us=measured.durations_us,
            transport=parts.transport.facts,
            peak_bytes=peak_bytes(),
            packages=parts.transport.about() | parts.experts.about(),
            timed=measured.timed,
            device_state=measured.device_state,
            replays=measured.replays,
            layer_graphs=measured.layer_graphs,
            errors=[] if self._errors is None else self._errors.found,
            accepted=parts.injector.accepted(outputs) if parts.injector else {},
            caller=self._caller,
            sub_batches=[
                SubBatchCounts(
                    name=name,
                    tokens=traffic.tokens[session.rank],
                    total_recv=traffic.total_recv[session.rank],
                    rows=rows,
                )
                for name, traffic, rows in zip(SUB_BATCHES, resolved.sub_batches, self._rows, strict=False)
            ],
            difference_map=differing_cells(outputs, comparisons, resolved.traffic.tokens, session.rank)
            if mapped
            else {},
        )

    def _take_beyond(self, arm: str, beyond: Tensor, sub_batch: int) -> None:
        """Note the sources of rows past the limit, once all sub-batches of a pass have come."""
        self._beyond = [*self._beyond[:sub_batch], beyond]
        if len(self._beyond) < len(self._stages):
            return
        beyond = torch.cat(self._beyond) if sub_batch else beyond
        listed = beyond[:LISTED_TOKENS].tolist() if beyond.shape[0] else []
        self._lost = LostRows(beyond.shape[0], [(rank, token) for rank, token in listed])
        if self._errors is not None:
            self._errors.take_beyond(arm, beyond)
        self._losses.take(arm, beyond)

    def _returned(self, arm: str) -> Returned | None:
        """Rows that the last pass of `arm` gave to combine, of all sub-batches; None where any of them is unknown.

        Passes that gave the same tensors get the same tensor.
        """
        parts = [one for stages in self._stages if (one := stages.returned(arm)) is not None]
        if len(parts) < len(self._stages):
            return None
        if len(parts) == 1:
            return parts[0]
        if self._joined is not None and _are_the_same(self._joined[0], parts):
            return self._joined[1]
        joined = together(parts)
        self._joined = self._joined or (parts, joined)
        return joined

    def _unfit(self, arm: str) -> Tensor | None:
        """Keys int64 [u] of rows with wrong inputs in the last pass of `arm`, of all sub-batches; None for none."""
        parts = [keys for stages in self._stages if (keys := stages.unfit(arm)) is not None]
        return torch.cat(parts) if parts else None

    def _keep(self, fresh: dict[str, Tensor], lost: dict[str, Tensor], *, settled: bool) -> None:
        self.outputs |= fresh
        self._without_rows |= lost
        self._settled = settled
        if self._recorder is not None:
            self._recorder.keep()

    def _check_combine(
        self, fresh: dict[str, Tensor], lost: dict[str, Tensor], rider: Rider | None, *, wrong: bool
    ) -> bool:
        passes = [
            Combined(arm, rows, self._returned(arm), arm in self._damaged, lost.get(arm)) for arm, rows in fresh.items()
        ]
        found, wrong = self._combine.check(passes, wrong=wrong, rider=rider)
        if self._resolved.sub_batches:
            found = [self._in_sub_batches(one) for one in found]
        known = {one.arm for one in self._divergences if one.stage == Stage.COMBINE}
        self._divergences += [one for one in found if one.arm not in known]
        return wrong

    def _count_wrong_tokens(self) -> None:
        for (combined, right), same in zip(self._taken, same_bits_each(self._taken), strict=True):
            wrong = 0 if same else compare_rows(combined, right).differing_tokens
            self._token_counts = self._token_counts.plus(combined.shape[0], wrong)
            self._wrong |= wrong > 0
        self._taken.clear()

    def _differs(self, fresh: dict[str, Tensor]) -> bool:
        """Whether an output of a repeat is not as required; in exact inputs all tokens were counted."""
        if self._expected is not None:
            return self._wrong
        right = fresh.get(Arm.PADDED, self.outputs.get(Arm.PADDED))
        return any(right is None or not same_bits(rows, right) for rows in fresh.values())

    def _in_sub_batches(self, found: Divergence) -> Divergence:
        """Name the sub-batches of wrong tokens: those of this rank that were examined, else the first."""
        first = self._resolved.sub_batches[0].tokens[self._session.rank]
        tokens = [token for _, token in found.evidence.tokens] or [found.source_token or 0]
        names = sorted({SUB_BATCHES[token >= first] for token in tokens})
        return msgspec.structs.replace(found, sub_batch=" and ".join(names))

    def _distances(self) -> dict[str, float | None]:
        """Distance of each arm from padded, over tokens that lost no row; empty where an oracle knows every bit."""
        if self._expected is not None:
            return {}
        found = {}
        for arm, tokens in self.outputs.items():
            lost = self._without_rows.get(arm)
            found[arm] = relative_error(surviving(tokens, lost), surviving(self.outputs[Arm.PADDED], lost))
        return found

    def _rows_after_cut(self, arm: str, rows: int, total: int) -> int:
        """Rows that the experts are called with, for a receive buffer of `rows` rows, `total` of them received."""
        resolved = self._resolved
        if arm == Arm.PRODUCTION:
            return production_rows(resolved, self._session.rank, self._session.local_ranks)
        if arm != Arm.TRUNCATED or resolved.limit is None:
            return rows
        guarded = resolved.case.policy == "guard"
        return min(max(resolved.limit, total) if guarded else resolved.limit, rows)

    def _kernel(self, rows: int) -> dict[str, Any]:
        known = next((kernel for kernel in self.kernels.values() if kernel["rows"] == rows), None)
        if known is not None:
            return known
        choice = self._parts.experts.selection(rows)
        kernel: dict[str, Any] = msgspec.to_builtins(choice)
        return kernel | {"label": choice.label}

    def _note(self, found: Divergence | None) -> None:
        if found is None:
            return
        if found.proven:
            self._damaged.add(found.arm)
        place = (found.arm, found.stage, found.sub_batch)
        known = [one for one in self._divergences if (one.arm, one.stage, one.sub_batch) == place]
        if not known or (all(map(self._resolved.asks_for, known)) and not self._resolved.asks_for(found)):
            self._divergences.append(found)


def _digests(made: Outputs) -> dict[str, str]:
    if made.alike:
        return dict.fromkeys(made.arms, tensor_digest(made.digests[:, 0]))
    return {arm: tensor_digest(made.digests[:, index]) for index, arm in enumerate(made.arms)}


def _comparisons(made: Outputs, outputs: dict[str, Tensor]) -> dict[str, RowComparison]:
    pairs = pairs_of(made.arms)
    if made.alike:
        return {pair_name(pair): NO_DIFFERENCE for pair in pairs}
    return {pair_name(pair): compare_rows(outputs[pair[1]], outputs[pair[0]]) for pair in pairs}


def _checkers(
    rank: int, resolved: ResolvedCase, parts: Parts, counts: Tensor, received: Received | None
) -> list[StageChecker]:
    """One checker for each sub-batch, or one for all tokens."""
    workload, capacity = parts.workload, resolved.traffic.capacity
    local = parts.transport.local_slots
    if not resolved.sub_batches:
        return [StageChecker(workload, rank, counts[0], capacity, received, local_slots_only=local)]
    none, whole = (0,) * len(workload.tokens_per_rank), workload.tokens_per_rank
    middle = resolved.sub_batches[0].tokens
    return [
        StageChecker(workload, rank, sent, capacity, span.of(received), span, local_slots_only=local)
        for sent, span in zip(counts, (Span(none, middle), Span(middle, whole)), strict=True)
    ]


def _are_the_same(first: list[Returned], second: list[Returned]) -> bool:
    return all(
        one.rows is other.rows and torch.equal(one.keys, other.keys) for one, other in zip(first, second, strict=True)
    )
