"""The passes of one case on one rank, and this rank's observations of them."""

from __future__ import annotations

import random
import socket
import time
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from torch import Tensor

from distbench.case.stages import CUT_ARMS, TIMED_ARMS, Arm, Stage
from distbench.distributed.choose import choose_exchange
from distbench.distributed.session import Session
from distbench.experts.base import Cut, ExpertInput, Experts, ExpertWeights
from distbench.experts.roundings import roundings_of
from distbench.pipeline.graphs import GraphedExperts, replay_others
from distbench.pipeline.layer import run_layer
from distbench.pipeline.recorder import Finished, PartRecorder
from distbench.pipeline.timing import Timer
from distbench.pipeline.truncation import arms_of
from distbench.transport.base import Dispatched, Transport
from distbench.utils.devices import DeviceState
from distbench.utils.process import peak_bytes
from distbench.verify.combine_check import CombineChecker, Combined, Own
from distbench.verify.combine_model import OwnSlots, key_of
from distbench.verify.error_check import ErrorChecker, Pass
from distbench.verify.excuses import adds_atomically, tolerance
from distbench.verify.gather import Outputs
from distbench.verify.losses import Losses, surviving, survivors
from distbench.verify.records import (
    LISTED_TOKENS,
    NO_DIFFERENCE,
    ORACLE,
    ArmError,
    Divergence,
    LostRows,
    Observation,
    Replay,
    ResolvedCase,
    RowComparison,
    Timed,
    TokenCounts,
    pair_name,
    pairs_of,
)
from distbench.verify.row_compare import compare_rows, relative_error, same_bits, tensor_digest
from distbench.verify.stage_check import StageChecker, foreseen
from distbench.workload.batch import TokenBatch
from distbench.workload.inputs import Workload

if TYPE_CHECKING:
    from distbench.faults.injector import Injector

_LAPS = 4096


class Parts(NamedTuple):
    """The parts of a rank that a case runs with."""

    workload: Workload
    batch: TokenBatch
    weights: ExpertWeights
    transport: Transport
    experts: Experts
    injector: Injector | None = None


class Passes:
    """Runs the arms, once or repeatedly, and keeps the outputs and findings to report.

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
        """`counts` int64 [W, W]: rows that rank i sends to rank j, as agreed; `recorder` keeps the same passes."""
        self._session = session
        self._resolved = resolved
        self._parts = parts
        self._recorder = recorder
        self._expected, received = foreseen(parts.workload, session.rank, parts.batch)
        self._checker = StageChecker(parts.workload, session.rank, counts, resolved.traffic.capacity, received)
        self._divergences: list[Divergence] = []
        self._kernels: dict[str, dict[str, Any]] = {}
        self._lost = LostRows()
        self._losses = Losses(session.group, resolved, session.rank)
        self._without_rows: dict[str, Tensor] = {}
        self._token_counts = TokenCounts()
        self._waits = random.Random(f"{resolved.case.seed}/{session.rank}")  # noqa: S311 - jitter, no secret
        self._durations: dict[str, dict[str, list[float]]] = {}
        self._arm, self._timed_arm, self._stage, self._since = "", "", "", 0
        self._exchange = choose_exchange(session.group, session.shared, counts, session.device)
        self._slots = OwnSlots(parts.batch.ids, parts.workload.group, parts.transport.sum_order)
        self._combine_checker = CombineChecker(
            session,
            self._exchange,
            parts.workload,
            Own(session.rank, self._slots, self._expected),
            tolerance(resolved.case),
        )
        self._errors = self._error_checker() if self._expected is None else None
        self._beyond: dict[str, Tensor] = {}
        self._damaged: set[str] = set()
        self._wrong = False
        self._timed: dict[str, Timed] = {}
        self._device_state: DeviceState | None = None
        self._given: ExpertInput | None = None
        self._replays: list[Replay] = []
        self.outputs: dict[str, Tensor] = {}

    def run(self) -> None:
        """Run every arm `repeats` times. Collective."""
        resolved = self._resolved
        arms = arms_of(resolved.limit, resolved.case.policy, refused=resolved.refused)
        if self._parts.injector is not None:
            arms = {arm: self._parts.injector.around(cut) for arm, cut in arms.items()}
        settled = False
        repeat = 0
        for repeat in range(resolved.case.repeats):
            fresh: dict[str, Tensor] = {
                arm: self._run_arm(arm, cut) for arm, cut in arms.items() if arm != Arm.PADDED or repeat == 0
            }
            without_rows = self._losses.share()
            wrong = self._check_repeat(fresh, without_rows)
            if not settled:
                self.outputs |= fresh
                self._without_rows |= without_rows
                settled = wrong
                if self._recorder is not None:
                    self._recorder.keep()
            if resolved.case.until_failure and wrong:
                break
        self._token_counts = msgspec.structs.replace(self._token_counts, repeats=repeat + 1)
        self._mark(Stage.TIMING)
        self._time({arm: cut for arm, cut in arms.items() if arm in TIMED_ARMS})
        self._replay_graph()
        self._mark(Stage.GATHER)
        if self._expected is not None:
            self.outputs[ORACLE] = self._expected
        if self._recorder is not None:
            self._recorder.finish(Finished(self._parts.workload, self._parts.batch, self._parts.weights, self.outputs))

    def observation(self, made: Outputs) -> Observation:
        """This rank's observation, after `run`, of all its `outputs` as they were `made`."""
        session, resolved, outputs = self._session, self._resolved, self.outputs
        return Observation(
            rank=session.rank,
            host=socket.gethostname(),
            device=str(session.device),
            tokens=resolved.traffic.tokens[session.rank],
            total_recv=resolved.traffic.total_recv[session.rank],
            capacity=resolved.traffic.capacity,
            limit=resolved.limit,
            lost=self._lost,
            kernels=self._kernels,
            digests=_digests(made),
            divergences=self._divergences,
            comparisons=_comparisons(made, outputs),
            reference=None,
            distance=self._distances(),
            survivors=survivors(made, self._without_rows) if resolved.lossy else None,
            token_counts=self._token_counts,
            injected=self._parts.injector.hits if self._parts.injector else {},
            nan_tokens=dict(zip(outputs, made.rows.amax(2).isnan().sum(0).tolist(), strict=True)),
            durations_us=self._durations,
            transport=self._parts.transport.facts,
            peak_bytes=peak_bytes(),
            packages=self._packages(),
            timed=self._timed,
            device_state=self._device_state,
            replays=self._replays,
            errors=[] if self._errors is None else self._errors.found,
            accepted=self._parts.injector.accepted(outputs) if self._parts.injector else {},
        )

    def _distances(self) -> dict[str, float | None]:
        """Distance of each arm from padded, over tokens that lost no row; empty where an oracle knows every bit."""
        if self._expected is not None:
            return {}
        found = {}
        for arm, tokens in self.outputs.items():
            lost = self._without_rows.get(arm)
            found[arm] = relative_error(surviving(tokens, lost), surviving(self.outputs[Arm.PADDED], lost))
        return found

    def _packages(self) -> dict[str, Any]:
        return self._parts.transport.about() | self._parts.experts.about()

    def _error_checker(self) -> ErrorChecker:
        parts, resolved = self._parts, self._resolved
        return ErrorChecker(
            self._session,
            self._exchange,
            parts.workload,
            self._slots,
            parts.weights,
            parts.transport.facts,
            resolved.case.repeats + min(resolved.case.iterations, 1),
        )

    def _measure(self, fresh: dict[str, Tensor], lost: dict[str, Tensor]) -> None:
        """Measure the errors of the arms of a repeat. Collective."""
        if self._errors is None:
            return
        case = self._resolved.case
        families = {
            arm: roundings_of(case, self._parts.experts.selection(self._kernels[arm]["rows"])) for arm in self._kernels
        }
        passes = {
            arm: Pass(self._checker.returned(arm), rows, self._beyond.get(arm), lost.get(arm))
            for arm, rows in fresh.items()
        }
        self._errors.measure(passes, families, alike=self._kernels_round_alike())

    def _kernels_round_alike(self) -> bool:
        """Whether the kernels of the buffer and of the limit round alike on all ranks; `guard` cuts each its way."""
        case, capacity = self._resolved.case, self._resolved.traffic.capacity
        rows = {capacity, min(self._resolved.limit or capacity, capacity)}
        kernels = {roundings_of(case, self._parts.experts.selection(count)) for count in rows}
        return case.policy != "guard" and len(kernels) == 1

    def _error_of(self, arm: str, tokens: Tensor) -> ArmError | None:
        """Return the error of tokens that an arm gave again; None where none was made, or rows are lost. Collective."""
        if self._errors is None or (arm in CUT_ARMS and self._resolved.lossy):
            return None
        return self._errors.error_of(arm, tokens)

    def _run_arm(self, arm: str, cut: Cut) -> Tensor:
        self._arm = self._session.heartbeat.arm = arm
        parts = self._parts
        parts.transport.forget()
        combined = run_layer(parts.batch, parts.weights, parts.transport, parts.experts, cut, self._inspect, self._mark)
        self._mark(Stage.CHECK)
        self._expose(arm, combined)
        self._arm = self._session.heartbeat.arm = ""
        return combined

    def _check_repeat(self, fresh: dict[str, Tensor], lost: dict[str, Tensor]) -> bool:
        """Check combine's output in a repeat; return whether anything is wrong, or differs, on any rank. Collective.

        `lost` names the tokens, bool [n], that lost a row to the limit.
        In exact inputs combine is correct where every token has the oracle's bits.
        """
        self._mark(Stage.CHECK)
        wrong = bool(self._damaged) or self._differs(fresh)
        if self._expected is None or (wrong := self._session.on_any_rank(value=wrong)):
            returned = self._checker.returned
            passes = [
                Combined(arm, rows, returned(arm), arm in self._damaged, lost.get(arm)) for arm, rows in fresh.items()
            ]
            found, wrong = self._combine_checker.check(passes, wrong=wrong)
            known = {one.arm for one in self._divergences if one.stage == Stage.COMBINE}
            self._divergences += [one for one in found if one.arm not in known]
        self._damaged.clear()
        self._wrong = False
        self._measure(fresh, lost)
        return wrong

    def _differs(self, fresh: dict[str, Tensor]) -> bool:
        """Whether an output of a repeat is not as required; in exact inputs `_expose` has checked it."""
        if self._expected is not None:
            return self._wrong
        right = fresh.get(Arm.PADDED, self.outputs.get(Arm.PADDED))
        return any(right is None or not same_bits(rows, right) for rows in fresh.values())

    def _time(self, arms: dict[str, Cut]) -> None:
        parts, session = self._parts, self._session
        if not self._resolved.case.iterations:
            return
        timer = Timer(session, self._resolved.case)
        for arm, cut in arms.items():
            session.heartbeat.arm = arm
            parts.transport.forget()
            layer = partial(run_layer, parts.batch, parts.weights, parts.transport, parts.experts, cut, None)
            timed = timer.time(layer, self.outputs[arm], partial(self._error_of, arm))
            if timed.error is not None and self._errors is not None:
                timed = msgspec.structs.replace(timed, apart=self._errors.allowed_between(arm, Stage.COMBINE))
            self._timed[arm] = self._with_graphs(arm, timed)
        if session.device.type != "cpu":
            self._device_state = timer.state_while(layer)
        session.heartbeat.arm = ""

    def _with_graphs(self, arm: str, timed: Timed) -> Timed:
        """Timings with the memory that the arm's graph holds, and without that of other graphs."""
        graphed, peak = self._graphed(), timed.peak_device_bytes
        if graphed is None or peak is None:
            return timed
        uncounted = graphed.uncounted_bytes(self._kernels[arm]["rows"])
        return msgspec.structs.replace(timed, peak_device_bytes=peak + uncounted)

    def _replay_graph(self) -> None:
        """Replay the graph of the last arm with other tokens, and record wrong rows."""
        parts, graphed, given = self._parts, self._graphed(), self._given
        if graphed is None or given is None:
            return
        arm = list(self.outputs)[-1]
        repeats = self._resolved.case.numerics == "exact" or not adds_atomically(self._kernels[arm])
        apart = None if self._errors is None else self._errors.allowed_between(arm, Stage.EXPERTS)
        allowed = 0.0 if repeats else apart or tolerance(self._resolved.case)
        self._replays = replay_others(graphed, given, parts.weights, parts.workload, self._session.rank, allowed)
        wrong = next((replay for replay in self._replays if replay.wrong), None)
        if wrong is not None:
            self._divergences.append(
                Divergence(
                    stage=Stage.EXPERTS,
                    arm=arm,
                    rank=self._session.rank,
                    field=f"rows of a graph replay with {wrong.live} other live rows",
                    against="eager experts" if self._expected is None else ORACLE,
                    rows=wrong.wrong,
                )
            )

    def _graphed(self) -> GraphedExperts | None:
        """The experts if they run from graphs, without faults wrapped around them; else None."""
        injector = self._parts.injector
        experts = self._parts.experts if injector is None else injector.inner
        return experts if isinstance(experts, GraphedExperts) else None

    def _expose(self, arm: str, combined: Tensor) -> None:
        """Count wrong tokens of a pass: against the oracle, else against the arms that run the padded kernel."""
        right = self._expected
        if right is None and arm in (Arm.CONTROL, Arm.REPADDED):
            right = self.outputs.get(Arm.PADDED, combined)
        if right is not None:
            wrong = compare_rows(combined, right).differing_tokens
            self._token_counts = self._token_counts.plus(combined.shape[0], wrong)
            self._wrong |= wrong > 0

    def _inspect(self, sources: Tensor, dispatched: Dispatched, given: ExpertInput, expert_out: Tensor) -> None:
        arm, self._given = self._arm, given
        self._kernels[arm] = self._kernel(given.rows)
        if self._resolved.limit is not None and self._resolved.case.policy != "guard":
            self._lost = _lost_rows(sources, self._resolved.limit)
            if arm in CUT_ARMS:
                self._beyond[arm] = key_of(*sources[self._resolved.limit :].unbind(1))
        self._losses.take(arm, sources)
        for found in self._checker.check_rows(arm, sources, dispatched, given, expert_out):
            self._note(found)
        self._note(self._checker.check_cut(arm, sources, dispatched, given, self._rows_after_cut(arm, dispatched)))
        if self._recorder is not None:
            self._recorder.take(arm, sources, given, expert_out)

    def _rows_after_cut(self, arm: str, dispatched: Dispatched) -> int:
        """Rows that the experts are called with, for a receive buffer in its current state."""
        resolved, rows = self._resolved, dispatched.hidden.shape[0]
        if arm != Arm.TRUNCATED or resolved.limit is None:
            return rows
        guarded = resolved.case.policy == "guard"
        return min(max(resolved.limit, int(dispatched.total_recv)) if guarded else resolved.limit, rows)

    def _kernel(self, rows: int) -> dict[str, Any]:
        known = next((kernel for kernel in self._kernels.values() if kernel["rows"] == rows), None)
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
        known = [one for one in self._divergences if (one.arm, one.stage) == (found.arm, found.stage)]
        if not known or (all(map(self._resolved.asks_for, known)) and not self._resolved.asks_for(found)):
            self._divergences.append(found)

    def _mark(self, stage: Stage) -> None:
        now = time.perf_counter_ns()
        if self._stage and self._stage != Stage.CHECK:
            laps = self._durations.setdefault(self._timed_arm, {}).setdefault(self._stage, [])
            if len(laps) < _LAPS:
                laps.append((now - self._since) / 1000)
        if self._resolved.case.jitter:
            time.sleep(self._waits.random() * self._resolved.case.jitter / 1000)
            now = time.perf_counter_ns()
        self._stage, self._timed_arm, self._since = stage, self._arm, now
        self._session.heartbeat.mark(stage)


def _digests(made: Outputs) -> dict[str, str]:
    if made.alike:
        return dict.fromkeys(made.arms, tensor_digest(made.digests[:, 0]))
    return {arm: tensor_digest(made.digests[:, index]) for index, arm in enumerate(made.arms)}


def _comparisons(made: Outputs, outputs: dict[str, Tensor]) -> dict[str, RowComparison]:
    pairs = pairs_of(made.arms)
    if made.alike:
        return {pair_name(pair): NO_DIFFERENCE for pair in pairs}
    return {pair_name(pair): compare_rows(outputs[pair[1]], outputs[pair[0]]) for pair in pairs}


def _lost_rows(sources: Tensor, limit: int) -> LostRows:
    if sources.shape[0] <= limit:
        return LostRows()
    beyond = sources[limit:]
    return LostRows(beyond.shape[0], [(rank, token) for rank, token in beyond[:LISTED_TOKENS].tolist()])
