"""Faults of the cut between dispatch and experts."""

from __future__ import annotations

from torch import Tensor

from distbench.case.stages import Arm, Stage
from distbench.experts.base import ExpertInput
from distbench.faults.base import Fault
from distbench.transport.base import Dispatched

_CUT = {"limit": "sum32", "policy": "unchecked"}
_A_LIMIT = "a limit, and rows received on its rank"


class ShortLimit(Fault):
    """The limit is below total_recv on this rank only: half of its rows are lost."""

    name, stage, arm = "short-limit", Stage.TRUNCATE, Arm.TRUNCATED
    bug = "sglang PR 22952: too small a limit silently drops rows"
    shape = _CUT
    needs = _A_LIMIT

    def cut(self, dispatched: Dispatched, given: ExpertInput) -> ExpertInput:
        """Keep half of the received rows."""
        return _kept(self, dispatched, given, max(int(dispatched.total_recv) // 2, 1))


class OwnBatchLimit(Fault):
    """The limit is taken from this rank's own batch, not from the rows it receives."""

    name, stage, arm = "own-batch-limit", Stage.TRUNCATE, Arm.TRUNCATED
    bug = "ATOM 2176, sglang PR 36130: a bound from one rank's batch is below what uneven ranks receive"
    shape = _CUT
    needs = "a limit, and more rows received on its rank than it sends"

    def cut(self, dispatched: Dispatched, given: ExpertInput) -> ExpertInput:
        """Keep as many rows as this rank sends."""
        return _kept(self, dispatched, given, max(self.scene.case.tokens[self.scene.rank], 1))


class OffByOne(Fault):
    """The cut keeps one row fewer than were received."""

    name, stage, arm = "off-by-one", Stage.TRUNCATE, Arm.TRUNCATED
    bug = "sglang PR 22952's boundary: the last received row is lost"
    shape = _CUT
    needs = _A_LIMIT

    def cut(self, dispatched: Dispatched, given: ExpertInput) -> ExpertInput:
        """Keep all rows but the last."""
        return _kept(self, dispatched, given, max(int(dispatched.total_recv) - 1, 1))


class ShiftedWindow(Fault):
    """The cut begins one row late: every row is replaced by the next."""

    name, stage, arm = "shifted-window", Stage.TRUNCATE, Arm.TRUNCATED
    bug = "a slice index off by one, as in mori 507: rows are doubled and dropped"
    shape = _CUT
    needs = _A_LIMIT

    def cut(self, dispatched: Dispatched, given: ExpertInput) -> ExpertInput:
        """Take `[1:M + 1]`."""
        self.hits += int(dispatched.total_recv)
        return _window(dispatched, 1, given.rows + 1)._replace(num_local_tokens=given.num_local_tokens)


class ScalesNotCut(Fault):
    """Scales are cut as a flat buffer while the kernel strides by the remaining rows."""

    name, stage, arm = "scales-not-cut", Stage.TRUNCATE, Arm.TRUNCATED
    bug = "aiter 2759: scales of expert-parallel rows read in another layout than they were written in"
    shape = {**_CUT, "dispatch_dtype": "fp8", "model": "tiny"}
    needs = "a limit, and dispatch_dtype fp8"

    def cut(self, dispatched: Dispatched, given: ExpertInput) -> ExpertInput:
        """Read column-major scales of R rows as if there were M rows."""
        if dispatched.scales is None:
            return given
        self.hits += int(dispatched.total_recv)
        flat = dispatched.scales.t().contiguous().flatten()
        blocks = dispatched.scales.shape[1]
        return given._replace(scales=flat[: given.rows * blocks].view(blocks, given.rows).t())


class WeightsNotCut(Fault):
    """Hidden rows and ids are cut, routing weights are not."""

    name, stage, arm = "weights-not-cut", Stage.TRUNCATE, Arm.TRUNCATED
    bug = "sglang PR 22952: all dispatched tensors have to be cut together"
    shape = _CUT
    needs = _A_LIMIT

    def cut(self, dispatched: Dispatched, given: ExpertInput) -> ExpertInput:
        """Pass the weights of the whole buffer."""
        self.hits += 1
        return given._replace(weights=dispatched.weights)


class ExpertCounts(Fault):
    """Per-expert counts are passed as the number of live rows: their first element is read."""

    name, stage, arm = "expert-counts", Stage.TRUNCATE, Arm.TRUNCATED
    bug = "vllm PR 53261: per-expert counts given to fused_moe, element 0 taken as the row count"
    shape = _CUT
    needs = _A_LIMIT

    def cut(self, dispatched: Dispatched, given: ExpertInput) -> ExpertInput:
        """Count the rows of the rank's first expert."""
        first = self.scene.rank * self.scene.case.experts_per_rank
        counted = _live_ids(dispatched).eq(first).sum().to(given.num_local_tokens.dtype).view(1)
        self.hits += int(dispatched.total_recv) - int(counted)
        return given._replace(num_local_tokens=counted)


class TailRouted(Fault):
    """Rows past total_recv count as real, with the ids left there."""

    name, stage, arm = "tail-routed", Stage.TRUNCATE, Arm.TRUNCATED
    bug = "DeepEP 739, rtp-llm 1325, aiter 2447: stale ids of padding rows are taken as real"
    shape = {**_CUT, "limit": "max-recv+8"}
    needs = "a limit above the rows received"

    def cut(self, dispatched: Dispatched, given: ExpertInput) -> ExpertInput:
        """Count all rows as live, and leave ids of this rank in the tail."""
        total = int(dispatched.total_recv)
        self.hits += max(given.rows - total, 0)
        given.ids[total:].fill_(self.scene.rank * self.scene.case.experts_per_rank)
        return given._replace(num_local_tokens=given.num_local_tokens.new_full((1,), given.rows))


class CutNotApplied(Fault):
    """The requested cut does not happen: the whole buffer reaches the experts."""

    name, stage, arm = "cut-not-applied", Stage.TRUNCATE, Arm.TRUNCATED
    bug = "sglang's near misses: a misspelt or negative limit silently cuts nothing"
    shape = _CUT
    needs = _A_LIMIT

    def cut(self, dispatched: Dispatched, given: ExpertInput) -> ExpertInput:
        """Pass the whole receive buffer on."""
        self.hits += 1
        return ExpertInput(*dispatched)


def _kept(fault: Fault, dispatched: Dispatched, given: ExpertInput, rows: int) -> ExpertInput:
    kept = min(rows, given.rows)
    fault.hits += max(int(dispatched.total_recv) - kept, int(kept != given.rows))
    return _window(dispatched, 0, kept)._replace(num_local_tokens=given.num_local_tokens)


def _window(dispatched: Dispatched, start: int, stop: int) -> ExpertInput:
    return ExpertInput(
        hidden=dispatched.hidden[start:stop],
        scales=None if dispatched.scales is None else dispatched.scales[start:stop],
        weights=dispatched.weights[start:stop],
        ids=dispatched.ids[start:stop],
        num_local_tokens=dispatched.total_recv,
    )


def _live_ids(dispatched: Dispatched) -> Tensor:
    return dispatched.ids[: int(dispatched.total_recv)]
