"""The arm production with the text of vLLM and of ATOM on real ranks: the oracle's bits, and the rows of `fused_moe`.

Each test runs with a synthetic text, and with the released one where a variable names it (`tests/slim_wheel.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from distbench.callers.atom.definitions import DEFINITIONS as ATOM
from distbench.callers.lift import Lift, Stub
from distbench.callers.packages import FolderText
from distbench.callers.text import CallerUse
from distbench.callers.vllm.definitions import EXPERTS
from distbench.case.atom_folder import PLUGIN, folder_digest
from distbench.case.spec import Case
from distbench.distributed.session import Session
from distbench.errors import Verdict
from distbench.pipeline.run_case import run_case
from distbench.verify.records import Outcome
from tests.cases import tiny_case
from tests.ranks import on_ranks
from tests.slim_wheel import atom_folder, vllm_wheel

FREE = {"model": "custom", "hidden_size": 256, "intermediate_size": 128, "num_experts": 8, "topk": 4}
R128 = {"max_dispatch_tokens_per_rank": 16}
"""Receive buffers of 128 rows on 8 ranks."""
PLUGIN_RULE = {"atom_rule": "vllm-plugin"}
TEXTS = pytest.mark.parametrize("released", [False, True], ids=["synthetic", "released"])


def texts(folder: Path, caller: str, *, released: bool) -> dict[str, str]:
    """The keys of a case that name the caller and its text."""
    if caller == "vllm":
        return {"caller": caller, "caller_wheel": vllm_wheel(folder, released=released)}
    return {"caller": caller, "caller_folder": atom_folder(folder, released=released)}


def outcome_of(session: Session, case: Case) -> Outcome | None:
    return run_case(session, case)


def outcome(ranks: int, **values: Any) -> Outcome:
    defaults = {"experts": "aiter", "emulate": True, "limit": "off"}
    digest = folder_digest(values.get("caller_folder", ""))
    named = {key: values.pop(key) for key in ("caller", "caller_wheel", "caller_folder") if key in values}
    rule = {key: values.pop(key) for key in ("atom_rule", "atom_graph_bs") if key in values}
    case = msgspec.structs.replace(
        tiny_case(ranks, **FREE | defaults | values), **named, **rule, caller_folder_sha256=digest
    )
    found: Outcome | None = on_ranks(ranks, outcome_of, case)[0]
    assert found is not None
    return found


def passed(ranks: int, **values: Any) -> list[CallerUse]:
    """What the caller did on each rank, in a case that passes: production has the oracle's bits."""
    found = outcome(ranks, **values)
    assert found.judgement.verdict is Verdict.PASS, found.judgement
    assert found.gathered is not None
    assert found.gathered.comparisons["production/oracle"].equal
    return [record.caller for record in found.gathered.observations if record.caller is not None]


@TEXTS
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_vllm_gives_the_whole_buffer_and_has_the_oracles_bits(tmp_path: Path, ranks: int, released: bool) -> None:
    named = texts(tmp_path, "vllm", released=released)
    idle = [0, *(1 + 5 * rank % 9 for rank in range(1, ranks))]
    cases: list[dict[str, Any]] = [
        {"dispatch_dtype": "bf16", "tokens": idle, "limit": "sum", "numerics": "both" if ranks == 2 else "exact"},
        {"dispatch_dtype": "fp8", "tokens": [5, 7] * (ranks // 2), "limit": "sum32"},
    ]
    if released:
        cases += [
            {"dispatch_dtype": "bf16", "tokens": [5, 7] * (ranks // 2), "numerics": "both"},
            {"dispatch_dtype": "fp8", "tokens": idle, "numerics": "both", "recv_bound": True},
            {"dispatch_dtype": "bf16", "tokens": [0] * ranks},
        ]
    for values in cases:
        uses = passed(ranks, **named, **values)
        assert [use.rows for use in uses] == [64 * ranks] * ranks, values


@TEXTS
def test_arguments_of_vllm_that_differ_from_distbenchs_are_known(tmp_path: Path, released: bool) -> None:
    uses = passed(2, **texts(tmp_path, "vllm", released=released), tokens=[5, 7], dispatch_dtype="fp8")
    mask = ("int32 [9]", "int32 [8]")
    assert [use.differing for use in uses] == [{"expert_mask": mask, "swiglu_limit": ("0.0", "None")}] * 2


def test_release_of_vllm_without_a_definition_is_unsupported_on_all_ranks(tmp_path: Path) -> None:
    wheel = vllm_wheel(tmp_path, {EXPERTS: ("class AiterExperts(", "class Experts(")})
    found = outcome(2, caller="vllm", caller_wheel=wheel)
    assert found.judgement.verdict is Verdict.UNSUPPORTED
    assert f"vllm 0.0.1: {EXPERTS} does not define AiterExperts" in found.judgement.reasons[0].message


@TEXTS
@pytest.mark.parametrize(
    ("ranks", "values", "rows"),
    [
        (8, R128 | {"tokens": [4] * 8, "atom_graph_bs": 4}, [32] * 8),
        (8, R128 | {"tokens": [4] * 8}, [128] * 8),
        (8, R128 | {"tokens": [16] * 8, "atom_graph_bs": 16}, [128] * 8),
        (4, {"tokens": [0, 6, 2, 9], "atom_graph_bs": 9, "numerics": "both", "dispatch_dtype": "fp8"}, [36] * 4),
        (2, {"tokens": [0, 7], "atom_graph_bs": 7, "limit": "sum32"}, [14] * 2),
        (2, {"tokens": [0, 7], "dispatch_dtype": "fp8"}, [128] * 2),
        (8, R128 | PLUGIN_RULE | {"tokens": [3] * 8, "atom_graph_bs": 3}, [96] * 8),
        (2, PLUGIN_RULE | {"tokens": [0, 0]}, [128] * 2),
        (2, PLUGIN_RULE | {"tokens": [16, 16], "atom_graph_bs": 16, "dispatch_dtype": "fp8"}, [128] * 2),
        (8, PLUGIN_RULE | {"tokens": [0, 3, 5, 1, 7, 2, 6, 4], "dispatch_dtype": "fp8"}, "received"),
        (4, PLUGIN_RULE | {"tokens": [0, 3, 5, 1], "topk": 1, "numerics": "both"}, "received"),
    ],
    ids=str,
)
def test_rows_that_atom_gives_to_fused_moe_and_its_bits(
    tmp_path: Path, ranks: int, values: dict[str, Any], rows: list[int] | str, released: bool
) -> None:
    found = outcome(ranks, **texts(tmp_path, "atom", released=released), **values)
    assert found.judgement.verdict is Verdict.PASS, found.judgement
    assert found.gathered is not None
    assert found.gathered.comparisons["production/oracle"].equal
    records = found.gathered.observations
    expected = [record.total_recv or record.capacity for record in records] if rows == "received" else rows
    assert [record.caller.rows for record in records if record.caller is not None] == expected


@TEXTS
def test_atoms_plugin_cuts_nothing_while_a_graph_is_captured(
    tmp_path: Path, released: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = atom_folder(tmp_path, released=released)
    modules = {
        "vllm.config": Stub(CUDAGraphMode=Stub(FULL="FULL")),
        "vllm.forward_context": Stub(get_forward_context=None, is_forward_context_available=lambda: False),
    }
    given = dict.fromkeys(("mk", "MoriPrepareAndFinalize", "functools", "get_cu_num"))
    given |= {"torch": torch, "VLLM_MORI_LAUNCH_CONFIG_TOKEN_THRESHOLD": 4096}
    text = FolderText("atom", folder, folder_digest(folder))
    trim = Lift(text, modules).lift(PLUGIN, ATOM[PLUGIN], given)["trim_vllm_mori_dispatch_tensors"]
    rows, ids, live = torch.ones(128, 8), torch.ones(128, 4, dtype=torch.int32), torch.tensor([9], dtype=torch.int32)
    assert trim(rows, None, ids, ids, ids[:3], 8, live)[0].shape[0] == 9
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert trim(rows, None, ids, ids, ids[:3], 8, live)[0].shape[0] == 128


def test_text_of_atom_without_a_definition_is_unsupported_and_named(tmp_path: Path) -> None:
    folder = atom_folder(tmp_path, {PLUGIN: ("def apply_vllm_mori_patch(", "def apply_patch(")})
    found = outcome(2, caller="atom", caller_folder=folder, **PLUGIN_RULE)
    assert found.judgement.verdict is Verdict.UNSUPPORTED
    label = f"atom {folder_digest(folder)[:12]}"
    assert f"{label}: {PLUGIN} does not define apply_vllm_mori_patch" in found.judgement.reasons[0].message
