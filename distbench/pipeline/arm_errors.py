"""Errors of a rank's arms against ideal roundings, where its inputs are gaussian."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from distbench.case.stages import CUT_ARMS, Arm, Stage
from distbench.distributed.exchange import Exchange
from distbench.distributed.session import Session
from distbench.experts.roundings import Roundings, roundings_of
from distbench.pipeline.parts import Parts
from distbench.pipeline.production_rows import production_rows
from distbench.verify.combine_check import Rider
from distbench.verify.combine_model import OwnSlots, Returned, key_of
from distbench.verify.error_check import ErrorChecker, Pass
from distbench.verify.records import ArmError, ResolvedCase
from distbench.verify.stage_check import Received


class Made(NamedTuple):
    """The arms of a repeat: their tokens, those bool [n] that lost a row, the rows given to combine, kernels' rows.

    `unfit` gives the keys of rows that the experts were given wrong, or None.
    """

    fresh: Mapping[str, Tensor]
    lost: Mapping[str, Tensor]
    returned: Callable[[str], Returned | None]
    unfit: Callable[[str], Tensor | None]
    rows: Mapping[str, int]


class ArmErrors:
    """Measures the passes of each repeat, and tokens that an arm gave again."""

    def __init__(  # noqa: PLR0913 - the inputs of the measurement
        self,
        session: Session,
        resolved: ResolvedCase,
        parts: Parts,
        exchange: Exchange,
        slots: OwnSlots,
        received: Received | None,
    ) -> None:
        """`slots` are this rank's own, `exchange` moves sampled rows between ranks; `received`: see `ErrorChecker`."""
        self._resolved = resolved
        self._experts = parts.experts
        self._beyond: dict[str, Tensor] = {}
        self._checker = ErrorChecker(
            session,
            exchange,
            parts.workload,
            slots,
            # the experts may write to their mask by mistake, and the ideal would index by it
            parts.weights._replace(mask=parts.weights.mask.clone()),
            parts.transport.facts,
            resolved.case.repeats + min(resolved.case.iterations, 1),
            len(Arm) - (parts.caller is None),
            received,
        )
        self._cut_rows = _rows_of_cuts(resolved, session.local_ranks)

    @property
    def found(self) -> list[ArmError]:
        """See `ErrorChecker.found`."""
        return self._checker.found

    def take_beyond(self, arm: str, beyond: Tensor) -> None:
        """Note the sources int64 [l, 2] of rows past the limit, which a pass of a cut arm loses."""
        if arm in CUT_ARMS:
            self._beyond[arm] = key_of(*beyond.unbind(1))

    def rider(self, made: Made) -> Rider | None:
        """See `ErrorChecker.rider`."""
        return self._checker.rider(*self._asked(made), alike=self._kernels_round_alike())

    def measure(self, made: Made) -> None:
        """Measure the arms of a repeat. Collective."""
        self._checker.measure(*self._asked(made), alike=self._kernels_round_alike())

    def _asked(self, made: Made) -> tuple[dict[str, Pass], dict[str, Roundings]]:
        """Return the passes of a repeat, and the roundings of their kernels."""
        passes = {
            arm: Pass(made.returned(arm), tokens, self._left_out(made, arm), made.lost.get(arm))
            for arm, tokens in made.fresh.items()
        }
        return passes, {arm: self._roundings(count) for arm, count in made.rows.items()}

    def _left_out(self, made: Made, arm: str) -> Tensor | None:
        """Return the keys of rows that say nothing of the experts: past the limit, or given to them wrong."""
        keys = [one for one in (self._beyond.get(arm), made.unfit(arm)) if one is not None]
        return torch.cat(keys) if keys else None

    def error_of(self, arm: str, tokens: Tensor) -> ArmError | None:
        """Return the error of tokens that an arm gave again; None where none was made, or rows are lost. Collective."""
        if arm in CUT_ARMS and self._resolved.lossy:
            return None
        return self._checker.error_of(arm, tokens)

    def between(self, arm: str, stage: Stage) -> float | None:
        """See `ErrorChecker.allowed_between`."""
        return self._checker.allowed_between(arm, stage)

    def _roundings(self, rows: int) -> Roundings:
        choice = self._experts.selection(rows)
        return self._experts.roundings(choice) or roundings_of(self._resolved.case, choice)

    def _kernels_round_alike(self) -> bool:
        """Whether the kernels of the buffer and of all cuts round alike on all ranks; `guard` cuts each its way."""
        case, capacity = self._resolved.case, self._resolved.traffic.capacity
        rows = {capacity, *self._cut_rows}
        return case.policy != "guard" and len({self._roundings(count) for count in rows}) == 1


def _rows_of_cuts(resolved: ResolvedCase, local_ranks: int) -> set[int]:
    """Rows that the cut arms of any rank keep, where they are not wrong."""
    capacity, case = resolved.traffic.capacity, resolved.case
    callers = range(case.ep_size) if case.caller != "own" else ()
    return {
        min(resolved.limit or capacity, capacity),
        *(production_rows(resolved, rank, local_ranks) for rank in callers),
    }
