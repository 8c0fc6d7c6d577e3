"""Errors in a copy of SGLang's text are caught as the arm production, and the caller's release is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from distbench.callers.sglang.definitions import DISPATCHER, RUNNER
from distbench.case.sglang_releases import NEWEST
from distbench.case.spec import Case
from distbench.distributed.session import Session
from distbench.errors import DistbenchError, Verdict
from distbench.pipeline.run_case import run_case
from distbench.verify.records import Outcome
from tests.cases import tiny_case
from tests.ranks import on_ranks
from tests.slim_wheel import slim_wheel

RANKS = 2
LABEL = f"sglang {NEWEST}"
FP8 = {"dispatch_dtype": "fp8"}
BOUND = {"limit": "off", "recv_bound": True}
CUT = """            hidden_states = hidden_states[:mori_max]
            if a1_scale is not None:
                a1_scale = a1_scale[:mori_max]
            topk_ids = topk_ids[:mori_max]
            topk_weights = topk_weights[:mori_max]
"""
SENT = """            ) = self.mori_op.dispatch(
                hidden_states,
                topk_weights,
                scale,
                topk_ids,
"""


def caller_case(wheel: str, **values: Any) -> Case:
    defaults = {"tokens": [20, 33], "limit": "60", "experts": "aiter", "emulate": True}
    return msgspec.structs.replace(tiny_case(RANKS, **defaults | values), caller="sglang", caller_wheel=wheel)


def outcome_of(session: Session, case: Case) -> Outcome | str | None:
    """The outcome on rank 0; the arm and the message where an error would end the rank."""
    try:
        return run_case(session, case)
    except DistbenchError as error:
        return f"{session.heartbeat.arm}: {error}"


def ran(case: Case) -> Outcome | str:
    found: Outcome | str | None = on_ranks(RANKS, outcome_of, case)[0]
    assert found is not None
    return found


CORRUPT = [
    (
        "routing weights are applied in the first stage",
        RUNNER,
        "doweight_stage1=quant_info.doweight_stage1",
        "doweight_stage1=True",
        {},
    ),
    ("only hidden is cut", RUNNER, CUT, CUT[: CUT.index("            if")], {}),
    ("weights are not cut", RUNNER, CUT, CUT.replace("topk_weights[:mori_max]", "topk_weights"), {}),
    ("scales are not cut", RUNNER, CUT, CUT.replace("a1_scale[:mori_max]", "a1_scale"), FP8),
    ("scales are forgotten", RUNNER, "a1_scale = dispatch_output.hidden_states_scale", "a1_scale = None", FP8),
    (
        "num_local_tokens is cut",
        RUNNER,
        CUT,
        f"{CUT}            num_local_tokens = num_local_tokens.clamp(max=mori_max // 2)\n",
        {},
    ),
    ("nothing is cut", RUNNER, "if 0 < mori_max < hidden", "if hidden_states.shape[0] < mori_max < hidden", {}),
    (
        "the bound is not rounded",
        DISPATCHER,
        "return max(MORI_MIN_LOGICAL_RECV_ROWS, -(-cluster_rows // align) * align)",
        "return max(MORI_MIN_LOGICAL_RECV_ROWS, cluster_rows)",
        BOUND,
    ),
    ("the limit is rounded", DISPATCHER, "min(self._manual_recv_cap,", "min(-(-self._manual_recv_cap // 32) * 32,", {}),
    (
        "the bound is rounded to a power of two",
        DISPATCHER,
        "        self._recv_cap_pow2_buckets = False\n",
        "        self._recv_cap_pow2_buckets = True\n",
        BOUND | {"tokens": [30, 35]},
    ),
    ("the limit is ignored", DISPATCHER, "if self._manual_recv_cap > 0:", "if self._manual_recv_cap < 0:", {}),
    ("tp is not compared with ep", DISPATCHER, " or parallel.tp_size != ep_size", "", BOUND | {"tp_size": 4}),
    (
        "stale metadata is not found",
        DISPATCHER,
        "    if local_rows != expected_local_rows:\n        return 0\n",
        "",
        BOUND | {"sender_rows": "20,35"},
    ),
    (
        "the layout is not looked at",
        DISPATCHER,
        "            and self._is_recv_layout_verified()\n",
        "",
        BOUND | {"mori_kernel": "IntraNodeLL"},
    ),
    ("ids are dispatched in another order", DISPATCHER, SENT, SENT.replace("topk_ids", "topk_ids.roll(1, 0)"), {}),
    (
        "scales and weights are dispatched in each other's place",
        DISPATCHER,
        SENT,
        SENT.replace("topk_weights,\n                scale", "scale,\n                topk_weights"),
        FP8,
    ),
    (
        "the mask is another rank's",
        DISPATCHER,
        "start = ep_rank * num_local_experts",
        "start = (ep_rank + 1) * num_local_experts % num_experts",
        {},
    ),
    (
        "combine gets other ids",
        RUNNER,
        'running_state["aiter_combine_topk_ids"] = dispatch_output.origin_topk_ids',
        'running_state["aiter_combine_topk_ids"] = dispatch_output.origin_topk_ids.flip(0)',
        {"topk": 1},
    ),
    (
        "weights are rounded to bf16",
        RUNNER,
        "dispatch_output.topk_weights.to(torch.float32)",
        "dispatch_output.topk_weights.bfloat16().float()",
        {"numerics": "both"},
    ),
    ("the activation is another", RUNNER, '"silu": "Silu"', '"silu": "Gelu"', {}),
]


@pytest.mark.parametrize(("error", "file", "old", "new", "values"), CORRUPT, ids=[one[0] for one in CORRUPT])
def test_error_in_sglangs_text_is_corrupt_in_production_alone(
    tmp_path: Path, error: str, file: str, old: str, new: str, values: dict[str, Any]
) -> None:
    del error
    outcome = ran(caller_case(slim_wheel(tmp_path, {file: (old, new)}), **values))
    assert isinstance(outcome, Outcome), outcome
    assert outcome.judgement.verdict is Verdict.CORRUPT, outcome.judgement
    first = outcome.judgement.first_divergence
    assert first is not None
    assert first.arm == "production"
    assert f"production ({LABEL})" in outcome.judgement.reasons[0].message
    assert f"production ({LABEL})" in outcome.diagnosis[0].evidence


FAULTS = [
    (
        "ids are those of the next row",
        RUNNER,
        CUT,
        CUT.replace("topk_ids[:mori_max]", "topk_ids[1 : mori_max + 1]"),
        {},
    ),
    (
        "combine gets the received ids",
        RUNNER,
        'running_state["aiter_combine_topk_ids"] = dispatch_output.origin_topk_ids',
        'running_state["aiter_combine_topk_ids"] = dispatch_output.topk_ids',
        {},
    ),
    ("weights are exchanged", RUNNER, "w1=quant_info.w13_weight,", "w1=quant_info.w2_weight,", {}),
    (
        "the quantisation is another",
        RUNNER,
        "        return weight_quant\n",
        "        return AiterQuantType.PER_TOKEN\n",
        FP8,
    ),
    ("num_local_tokens is forgotten", RUNNER, 'extra["num_local_tokens"] = runner_input.num_local_tokens', "pass", {}),
    (
        "the bound is the rank's own rows",
        DISPATCHER,
        "    return sum(sender_rows)\n",
        "    return local_rows\n",
        BOUND | {"tokens": [30, 31]},
    ),
    (
        "a token is dropped",
        DISPATCHER,
        "return hidden_states[: self._num_tokens]",
        "return hidden_states[: self._num_tokens - 1]",
        {},
    ),
    ("an argument is unknown", RUNNER, "a2_scale=quant_info.a2_scale,", "a2_scales=quant_info.a2_scale,", {}),
]


@pytest.mark.parametrize(("error", "file", "old", "new", "values"), FAULTS, ids=[one[0] for one in FAULTS])
def test_error_in_sglangs_text_ends_the_rank_in_production(
    tmp_path: Path, error: str, file: str, old: str, new: str, values: dict[str, Any]
) -> None:
    del error
    message = ran(caller_case(slim_wheel(tmp_path, {file: (old, new)}), **values))
    assert isinstance(message, str), message
    assert message.startswith("production: ")
    assert LABEL in message


def test_limit_above_the_buffer_that_is_not_clamped_gives_the_same_rows(tmp_path: Path) -> None:
    clamped = "min(self._manual_recv_cap, self._get_physical_recv_rows())"
    wheel = slim_wheel(tmp_path, {DISPATCHER: (clamped, "self._manual_recv_cap")})
    outcome = ran(caller_case(wheel, limit="100000"))
    assert isinstance(outcome, Outcome), outcome
    assert outcome.judgement.verdict is Verdict.PASS


def test_overlap_of_batches_that_is_not_looked_at_gives_the_same_rows(tmp_path: Path) -> None:
    """A sub-batch has no metadata of the senders, without which there is no bound."""
    wheel = slim_wheel(tmp_path, {DISPATCHER: ("            and not self._tbo_enabled\n", "")})
    outcome = ran(caller_case(wheel, **BOUND, two_batch_overlap=True))
    assert isinstance(outcome, Outcome), outcome
    assert outcome.judgement.verdict is Verdict.PASS
    assert outcome.gathered is not None
    assert {record.caller.rows for record in outcome.gathered.observations if record.caller} == {128}


def test_released_text_passes(tmp_path: Path) -> None:
    outcome = ran(caller_case(slim_wheel(tmp_path)))
    assert isinstance(outcome, Outcome), outcome
    assert outcome.judgement.verdict is Verdict.PASS
    assert outcome.gathered is not None
    use = outcome.gathered.observations[0].caller
    assert use is not None
    assert (use.text.label, use.rows) == (LABEL, 60)
