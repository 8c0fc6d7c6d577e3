"""Faults of the experts: kernels, tables and masks."""

from __future__ import annotations

import os
import signal

import torch
from torch import Tensor

from distbench.case.stages import Arm, Stage
from distbench.experts.base import ExpertInput
from distbench.faults.base import Fault
from distbench.faults.dispatch import BIT, flip
from distbench.faults.options import whole
from distbench.workload.routing_spec import slots_of
from distbench.workload.slots import logical_experts


class ExpertBit(Fault):
    """One bit of one row of the experts' output is wrong."""

    name, stage = "flipped-expert-bit", Stage.EXPERTS
    bug = "aiter 3117: uninitialised lanes in a stage-2 kernel"
    options = {"bit": BIT}

    def computed(self, given: ExpertInput, rows: Tensor) -> Tensor:
        """Flip bit `bit` of a live row, a random one if negative."""
        live = _live(given)
        if live:
            bit = self.chosen["bit"]
            flip(rows, self.pick(live), bit if bit >= 0 else int(self.random(1) * rows.shape[1] * 16))
        return rows


class WrongBucket(Fault):
    """The kernel of one bucket of row counts computes wrong numbers; all others are right."""

    name, stage, arm = "wrong-bucket", Stage.EXPERTS, Arm.TRUNCATED
    bug = "aiter 3933, sglang 27194: the kernel that one row count selects is wrong, its neighbours are right"
    options = {"rows": whole(256, 1, 1 << 24)}
    shape = {"limit": "256", "policy": "unchecked", "max_dispatch_tokens_per_rank": 128}
    needs = "a limit that gives the experts more than `rows` / 2 rows and at most `rows`"

    def computed(self, given: ExpertInput, rows: Tensor) -> Tensor:
        """Negate the results where M is in (rows / 2, rows]."""
        if self.chosen["rows"] // 2 < given.rows <= self.chosen["rows"]:
            self.hits += _live(given)
            rows[: _live(given)] *= -1
        return rows


class DiesAtM(Fault):
    """The kernel for 304 and for 336 rows ends the process."""

    name, stage, verdict = "dies-at-304-336", Stage.EXPERTS, "RANK_FAULT"
    bug = "aiter 4783: memory fault of the fp8 block-scaled fused_moe at M = 304 and 336"
    shape = {"limit": "304", "policy": "unchecked", "max_dispatch_tokens_per_rank": 256}
    needs = "a limit of 304 or 336 rows, and a buffer of more"

    def asked(self, given: ExpertInput) -> ExpertInput:
        """Die by SIGSEGV."""
        if given.rows in (304, 336):
            os.kill(os.getpid(), signal.SIGSEGV)
        return given


class Rerouting(Fault):
    """Base of faults that give the experts other ids than the received ones."""

    def reroute(self, given: ExpertInput, ids: Tensor) -> ExpertInput:
        """The call with `ids` int32 [M, k]; hits are the live rows in which they differ."""
        self.hits += int((ids != given.ids)[: _live(given)].any(1).sum())
        return given._replace(ids=ids)


class MaskAsMap(Rerouting):
    """The expert mask, ones and zeros, is read as the map from global to local experts."""

    name, stage = "mask-as-map", Stage.EXPERTS
    bug = "vllm PR 29773: fused_moe takes a binary mask where an index map was passed, or the reverse"
    needs = "two experts on its rank"

    def asked(self, given: ExpertInput) -> ExpertInput:
        """Send local routes to the second local expert."""
        case = self.scene.case
        first = self.scene.rank * case.experts_per_rank
        local = (given.ids >= first) & (given.ids < first + case.experts_per_rank)
        wrong = torch.where(local, first + min(1, case.experts_per_rank - 1), given.ids)
        return self.reroute(given, wrong)


class MaskOfOnes(Rerouting):
    """The expert mask is 1 everywhere: experts of other ranks count as local, and local weights stand in for theirs."""

    name, stage = "mask-all-ones", Stage.EXPERTS
    bug = "sglang's moriep.py: expert_mask_gpu needs SGLANG_USE_AITER; without a mask all experts are local"
    needs = "rows with an expert of another rank: two ranks or more"

    def asked(self, given: ExpertInput) -> ExpertInput:
        """Send each route of another rank to the local expert of the same place."""
        case = self.scene.case
        first = self.scene.rank * case.experts_per_rank
        valid = (given.ids >= 0) & (given.ids < case.placed_experts)
        wrong = torch.where(valid, first + given.ids % case.experts_per_rank, given.ids)
        return self.reroute(given, wrong)


class SharedTwice(Rerouting):
    """A rank adds its shared expert to each row that it receives, besides the rank of the row's token."""

    name, stage = "shared-counted-twice", Stage.EXPERTS
    bug = "sglang's select_experts: without a weight of 1/ep_size, ranks add a fused shared expert ep_size times"
    shape = {"shared_experts": 1}
    needs = "shared_experts, and rows of other ranks' tokens on its rank"

    def asked(self, given: ExpertInput) -> ExpertInput:
        """Take other ranks' slots of shared experts for its own."""
        case = self.scene.case
        local = case.experts_per_rank
        shared = (given.ids >= 0) & (given.ids < case.placed_experts)
        shared &= given.ids % local >= local - case.shared_experts
        wrong = torch.where(shared, self.scene.rank * local + given.ids % local, given.ids)
        return self.reroute(given, wrong)


class ReplicaTwice(Rerouting):
    """A rank computes the experts of which it holds a replica, also where a token's slot names another rank's."""

    name, stage = "replica-summed-twice", Stage.EXPERTS
    bug = "sglang's dispatch by expert location: ranks that pick replicas apart count a replicated expert several times"
    shape = {"physical_experts": 32}
    needs = "replicated experts, and rows with a slot of which its rank holds another replica"

    def asked(self, given: ExpertInput) -> ExpertInput:
        """Take slots of replicas on other ranks for its own."""
        case, device = self.scene.case, given.ids.device
        local = case.experts_per_rank
        first = self.scene.rank * local
        expert_of = logical_experts(slots_of(case), device)
        routed = expert_of[first : first + local - case.shared_experts]
        own = torch.full((case.num_experts + case.shared_experts,), -1, device=device)
        own[routed] = torch.arange(first, first + len(routed), device=device)
        valid = (given.ids >= 0) & (given.ids < case.placed_experts)
        valid &= (given.ids < first) | (given.ids >= first + local)
        found = own[expert_of[given.ids.long().masked_fill(~valid, 0)]]
        wrong = torch.where(valid & (found >= 0), found, given.ids).to(given.ids.dtype)
        return self.reroute(given, wrong)


class FewerSlots(Fault):
    """The tuned row for top-k - 1 is used: its kernel omits the last slot."""

    name, stage = "row-of-topk-minus-1", Stage.EXPERTS
    bug = "aiter 5595, 3377: the tuned row is looked up with top-k - 1"
    needs = "rows whose last slot is an expert of its rank"

    def asked(self, given: ExpertInput) -> ExpertInput:
        """Remove the last slot's expert."""
        case = self.scene.case
        fewer = given.ids.clone()
        fewer[:, -1] = -1
        first = self.scene.rank * case.experts_per_rank
        last = given.ids[: _live(given), -1]
        self.hits += int(((last >= first) & (last < first + case.experts_per_rank)).sum())
        return given._replace(ids=fewer)


class ZeroRows(Fault):
    """Some rows come back as zeros."""

    name, stage = "zero-rows", Stage.EXPERTS
    bug = "vllm 53108: fused_moe returns zeros for valid rows where the buffer has far more rows"

    def computed(self, given: ExpertInput, rows: Tensor) -> Tensor:
        """Zero a third of the rows."""
        live = _live(given)
        self.hits += -(-live // 3)
        rows[:live:3] = 0
        return rows


class NaNLanes(Fault):
    """The last columns of all rows are NaN."""

    name, stage = "nan-lanes", Stage.EXPERTS
    bug = "aiter 3117, 3344: padding lanes of a stage-2 kernel are left uninitialised"

    def computed(self, given: ExpertInput, rows: Tensor) -> Tensor:
        """Poison eight columns."""
        self.hits += _live(given)
        rows[: _live(given), -8:] = float("nan")
        return rows


def _live(given: ExpertInput) -> int:
    return min(int(given.num_local_tokens), given.rows)
