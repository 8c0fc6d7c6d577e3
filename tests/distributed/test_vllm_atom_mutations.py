"""Errors in copies of the texts of vLLM and ATOM are caught as the arm production, and the caller is named.

The synthetic texts are changed on every machine, the released ones where a variable names them (`tests/slim_wheel.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from distbench.callers.vllm.definitions import AITER_OPS, EXPERT_MAP, EXPERTS, KERNEL, PREPARE
from distbench.case.atom_folder import KERNEL as ATOM_KERNEL
from distbench.case.atom_folder import PLUGIN, folder_digest
from distbench.case.atom_folder import PREPARE as ATOM_PREPARE
from distbench.case.spec import Case
from distbench.distributed.session import Session
from distbench.errors import DistbenchError, Verdict
from distbench.pipeline.run_case import run_case
from distbench.verify.records import Outcome
from tests import synthetic_vllm
from tests.cases import tiny_case
from tests.ranks import on_ranks
from tests.slim_wheel import VLLM_RELEASE, atom_folder, vllm_wheel

RANKS = 2
FP8 = {"dispatch_dtype": "fp8"}
DECODE = {"atom_graph_bs": 33}
PLUGIN_RULE = {"atom_rule": "vllm-plugin"}


def outcome_of(session: Session, case: Case) -> Outcome | str | None:
    """The outcome on rank 0; the arm and the message where an error would end the rank."""
    try:
        return run_case(session, case)
    except DistbenchError as error:
        return f"{session.heartbeat.arm}: {error}"


def ran(texts: dict[str, str], values: dict[str, Any]) -> Outcome | str:
    defaults = {"tokens": [20, 33], "limit": "off", "experts": "aiter", "emulate": True}
    rule = {key: value for key, value in values.items() if key.startswith("atom_")}
    rest = {key: value for key, value in values.items() if key not in rule}
    found: Outcome | str | None = on_ranks(
        RANKS, outcome_of, msgspec.structs.replace(tiny_case(RANKS, **defaults | rest), **texts, **rule)
    )[0]
    assert found is not None
    return found


def judged(found: Outcome | str, label: str, *, ends: bool) -> None:
    """Whether production alone diverges, or ends the rank, and its caller is named."""
    if ends:
        assert isinstance(found, str), found
        assert found.startswith("production: ")
        assert label in found
        return
    assert isinstance(found, Outcome), found
    assert found.judgement.verdict is Verdict.CORRUPT, found.judgement
    first = found.judgement.first_divergence
    assert first is not None
    assert first.arm == "production"
    assert f"production ({label})" in found.judgement.reasons[0].message
    assert f"production ({label})" in found.diagnosis[0].evidence


def vllm(folder: Path, change: tuple[str, str, str], values: dict[str, Any], *, released: bool) -> Outcome | str:
    file, old, new = change
    wheel = vllm_wheel(folder, {file: (old, new)}, released=released)
    return ran({"caller": "vllm", "caller_wheel": wheel}, values)


def atom(
    folder: Path, change: tuple[str, str, str], values: dict[str, Any], *, released: bool
) -> tuple[Outcome | str, str]:
    file, old, new = change
    checkout = atom_folder(folder, {file: (old, new)}, released=released)
    digest = folder_digest(checkout)
    texts = {"caller": "atom", "caller_folder": checkout, "caller_folder_sha256": digest}
    return ran(texts, values), f"atom {digest[:12]}"


LAYER = "        made = self._fused_experts(\n            hidden"
SYNTHETIC_VLLM = [
    (
        "rows are cut",
        (KERNEL, LAYER, f"        rows, ids, weights = rows[:64], ids[:64], weights[:64]\n{LAYER}"),
        {},
        False,
    ),
    ("scales are forgotten", (PREPARE, "return got, got_scale,", "return got, None,"), FP8, False),
    (
        "weights are rounded to bf16",
        (PREPARE, "got_ids, got_weights\n", "got_ids, got_weights.bfloat16().float()\n"),
        {"numerics": "both"},
        False,
    ),
    ("combine gets the received ids", (PREPARE, "None, self.sent_ids)", "None, ids)"), {}, True),
    ("ids are sent in another order", (PREPARE, "weights, scale, ids)", "weights, scale, ids.roll(1, 0))"), {}, False),
    ("the mask is another rank's", (EXPERT_MAP, "ep_rank * count", "(1 - ep_rank) * count"), {}, False),
    ("num_local_tokens is forgotten", (AITER_OPS, "num_local_tokens=live", "num_local_tokens=None"), {}, True),
    (
        "num_local_tokens is another number",
        (EXPERTS, "live = meta.expert_num_tokens", "live = meta.expert_num_tokens // 2"),
        {},
        False,
    ),
    ("the quantisation is another", (EXPERTS, "QuantMethod.NO if", "QuantMethod.PER_TOKEN if"), {}, True),
    (
        "the matrices are exchanged",
        (
            AITER_OPS,
            "rows, w1, w2, weights, ids, mask, ActivationType",
            "rows, w2, w1, weights, ids, mask, ActivationType",
        ),
        {},
        True,
    ),
    ("a token is dropped", (PREPARE, "[: output.shape[0]]", "[: output.shape[0]].roll(1, 0)"), {}, False),
    (
        "combine is left out",
        (
            PREPARE,
            "output.copy_(self.mori_op.combine(made, None, self.sent_ids)[0][: output.shape[0]])",
            "output.zero_()",
        ),
        {},
        True,
    ),
    (
        "rows are dispatched twice",
        (
            PREPARE,
            "        self.sent_ids = ids\n",
            "        self.sent_ids = ids\n        self.mori_op.dispatch(rows, weights, scale, ids)\n",
        ),
        {},
        True,
    ),
]
RELEASED_VLLM = [
    (
        "rows are cut",
        (
            KERNEL,
            "return a1q, a1q_scale, expert_tokens_meta, topk_ids, topk_weights\n",
            "return a1q[:64], a1q_scale, expert_tokens_meta, topk_ids[:64], topk_weights[:64]\n",
        ),
        {},
        False,
    ),
    (
        "scales are forgotten",
        (
            PREPARE,
            "            dispatch_scale,\n            expert_tokens_meta",
            "            None,\n            expert_tokens_meta",
        ),
        FP8,
        False,
    ),
    (
        "combine gets the received ids",
        (
            PREPARE,
            "            None,\n            self._dispatch_topk_ids,\n",
            "            None,\n            topk_ids,\n",
        ),
        {},
        True,
    ),
    (
        "ids are sent in another order",
        (
            PREPARE,
            "dispatch(a1, topk_weights, scale, topk_ids)",
            "dispatch(a1, topk_weights, scale, topk_ids.roll(1, 0))",
        ),
        {},
        False,
    ),
    (
        "the mask is another rank's",
        (EXPERT_MAP, "start_idx = ep_rank * base_experts", "start_idx = (1 - ep_rank) * base_experts"),
        {},
        False,
    ),
    (
        "weights are rounded to bf16",
        (EXPERTS, "topk_weights = topk_weights.to(torch.float32)", "topk_weights = topk_weights.bfloat16().float()"),
        {"numerics": "both"},
        False,
    ),
    (
        "num_local_tokens is forgotten",
        (EXPERTS, "num_local_tokens = expert_tokens_meta.expert_num_tokens", "num_local_tokens = None"),
        {},
        True,
    ),
    (
        "the quantisation is another",
        (EXPERTS, "quant_method = QuantMethod.BLOCK_128x128.value", "quant_method = QuantMethod.PER_TOKEN.value"),
        FP8,
        True,
    ),
    (
        "the matrices are exchanged",
        (
            EXPERTS,
            "            w1=w1,\n            w2=w2,\n            topk_weights",
            "            w1=w2,\n            w2=w1,\n            topk_weights",
        ),
        {},
        True,
    ),
    (
        "the activation is another",
        (EXPERTS, "activation_method = ActivationMethod.SILU\n", "activation_method = ActivationMethod.GELU\n"),
        {},
        False,
    ),
    (
        "positional arguments change places",
        (
            AITER_OPS,
            "            activation_method,\n            quant_method,\n",
            "            quant_method,\n            activation_method,\n",
        ),
        FP8,
        True,
    ),
]
SYNTHETIC_ATOM = [
    (
        "only rows are cut",
        (ATOM_KERNEL, "rows[:keep], ids[:keep], weights[:keep]", "rows[:keep], ids, weights"),
        DECODE,
        False,
    ),
    ("scales are not cut", (ATOM_KERNEL, "else scale[:keep]", "else scale"), DECODE | FP8, False),
    ("the cut has the factor top-k", (ATOM_KERNEL, "get_dp_group().world_size\n", "ids.shape[1]\n"), DECODE, False),
    ("a prefill is cut", (ATOM_KERNEL, "if decode and keep", "if keep - 1 and keep"), {}, False),
    ("combine gets the received ids", (ATOM_KERNEL, "finalize(made, topk_ids)", "finalize(made, ids)"), DECODE, True),
    ("weights are of the next row", (ATOM_KERNEL, "weights[:keep]", "weights[1 : keep + 1]"), DECODE, False),
    ("num_local_tokens is forgotten", (ATOM_KERNEL, "meta.expert_num_tokens,", "None,"), {}, True),
    ("a token is dropped", (ATOM_PREPARE, "[0][:count]", "[0][: count - 1]"), {}, True),
    ("the plugin cuts a row too much", (PLUGIN, "int(live[0])", "int(live[0]) - 1"), PLUGIN_RULE, True),
    ("the plugin cuts nothing", (PLUGIN, "if keep and keep <", "if not keep and 1 <"), PLUGIN_RULE, False),
    (
        "the plugin's bound lacks top-k",
        (PLUGIN, "own_ids.numel() *", "own_ids.shape[0] *"),
        PLUGIN_RULE | {"tokens": [7, 7], "atom_graph_bs": 7},
        False,
    ),
]
CUT = """            dispatch_ids = dispatch_ids[:total_valid_tokens]
            dispatch_weights = dispatch_weights[:total_valid_tokens]
"""
RELEASED_ATOM = [
    ("only rows are cut", (ATOM_KERNEL, CUT, ""), DECODE, False),
    (
        "scales are not cut",
        (ATOM_KERNEL, "dispatch_scale = dispatch_scale[:total_valid_tokens]", "pass"),
        DECODE | FP8,
        False,
    ),
    (
        "the bound has the factor top-k",
        (ATOM_KERNEL, "context.graph_bs * dp_size\n", "context.graph_bs * topk_ids.shape[1]\n"),
        DECODE,
        False,
    ),
    ("a prefill is cut", (ATOM_KERNEL, "dispatch_a1.shape[0] and all_ranks_decode", "dispatch_a1.shape[0]"), {}, False),
    (
        "combine gets the received ids",
        (
            ATOM_KERNEL,
            "topk_ids,\n            apply_router_weight_on_input,\n        )\n",
            "dispatch_ids,\n            apply_router_weight_on_input,\n        )\n",
        ),
        {},
        True,
    ),
    (
        "num_local_tokens is forgotten",
        (ATOM_KERNEL, "num_local_tokens=expert_tokens_meta.expert_num_tokens", "num_local_tokens=None"),
        {},
        True,
    ),
    (
        "a token is dropped",
        (
            ATOM_PREPARE,
            "        return result[:num_token]\n\n    # 1.",
            "        return result[: num_token - 1]\n\n    # 1.",
        ),
        {},
        True,
    ),
    (
        "the quantisation is another",
        (
            ATOM_KERNEL,
            "            quant_type=quant_type,\n            num_local",
            "            quant_type=QuantType.per_Token,\n            num_local",
        ),
        FP8,
        True,
    ),
    (
        "the plugin cuts a row too much",
        (PLUGIN, "        valid_rows = exact\n", "        valid_rows = exact - 1\n"),
        PLUGIN_RULE,
        True,
    ),
    (
        "the plugin cuts nothing",
        (PLUGIN, "if valid_rows == 0 or valid_rows >=", "if valid_rows >= 0 or valid_rows >="),
        PLUGIN_RULE,
        False,
    ),
    (
        "the plugin does not cut weights",
        (PLUGIN, "dispatch_weights = dispatch_weights[:valid_rows]", "pass"),
        PLUGIN_RULE,
        False,
    ),
    (
        "the plugin's bound lacks top-k",
        (PLUGIN, "num_local_tokens * topk * ep_world_size", "num_local_tokens * ep_world_size"),
        PLUGIN_RULE | {"tokens": [7, 7], "atom_graph_bs": 7},
        False,
    ),
]
VLLM = [(False, *one) for one in SYNTHETIC_VLLM] + [(True, *one) for one in RELEASED_VLLM]
ATOM = [(False, *one) for one in SYNTHETIC_ATOM] + [(True, *one) for one in RELEASED_ATOM]


def names(table: list[Any]) -> list[str]:
    return [f"{'released' if released else 'synthetic'}: {error}" for released, error, *_ in table]


@pytest.mark.parametrize(("released", "error", "change", "values", "ends"), VLLM, ids=names(VLLM))
def test_error_in_vllms_text_is_caught_in_production_alone(
    tmp_path: Path, released: bool, error: str, change: tuple[str, str, str], values: dict[str, Any], ends: bool
) -> None:
    del error
    label = f"vllm {VLLM_RELEASE if released else synthetic_vllm.VERSION}"
    judged(vllm(tmp_path, change, values, released=released), label, ends=ends)


@pytest.mark.parametrize(("released", "error", "change", "values", "ends"), ATOM, ids=names(ATOM))
def test_error_in_atoms_text_is_caught_in_production_alone(
    tmp_path: Path, released: bool, error: str, change: tuple[str, str, str], values: dict[str, Any], ends: bool
) -> None:
    del error
    found, label = atom(tmp_path, change, values, released=released)
    judged(found, label, ends=ends)
