"""Capture over production's lifted code on real ranks: the trace has the routing that was dispatched."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from distbench.callers.operator import MoriOperator
from distbench.callers.sglang import caller as sglang_caller
from distbench.callers.vllm import caller as vllm_caller
from distbench.capture import sglang, vllm
from distbench.capture.settings import Settings
from distbench.case.spec import Case
from distbench.cli.main import main
from distbench.distributed.session import Session
from distbench.errors import Verdict
from distbench.pipeline.inputs import workload_for
from distbench.pipeline.run_case import run_case
from distbench.tools.recorded.captured import read_capture
from distbench.verify.records import Outcome
from distbench.workload.routing import route
from distbench.workload.routing_spec import ExpertGroup, parse_routing
from tests.cases import tiny_case
from tests.ranks import on_ranks
from tests.slim_wheel import slim_wheel, vllm_wheel

FREE = {"model": "custom", "hidden_size": 256, "intermediate_size": 128, "num_experts": 8, "topk": 4}
RANKS, TOKENS = 4, [5, 0, 9, 7]


def captured_run(session: Session, case: Case, settings: Settings, program: str) -> Outcome | None:
    """Run a case whose caller's dispatcher is under capture."""
    module: Any = {"sglang": sglang_caller, "vllm": vllm_caller}[program]
    lifted: Callable[..., Any] = module.load

    def load(*arguments: Any) -> Any:
        found = lifted(*arguments)
        if program == "sglang":
            opened = sglang.recording(found.dispatcher["MoriEPDispatcher"], settings, found.text.version)
        else:
            opened = vllm.recording(found.prepare_finalize, settings, found.text.version)
        stack.enter_context(opened)
        return found

    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        place = SimpleNamespace(rank=session.rank, world_size=RANKS, max_num_inp_token_per_rank=16)
        if program == "vllm":  # the field of MoRI's operator that vLLM's capture reads
            patch.setattr(MoriOperator, "config", place, raising=False)
        patch.setattr(module, "load", load)
        return run_case(session, case)


def captured(folder: Path, program: str, wheel: str, settings: Settings, **values: Any) -> tuple[Case, Outcome]:
    keys = FREE | {"experts": "aiter", "emulate": True, "limit": "off", "tokens": TOKENS} | values
    case = msgspec.structs.replace(tiny_case(RANKS, **keys), caller=program, caller_wheel=wheel)
    outcome: Outcome | None = on_ranks(RANKS, captured_run, case, settings._replace(folder=str(folder)), program)[0]
    assert outcome is not None
    return case, outcome


def routed(case: Case) -> list[list[int]]:
    group = ExpertGroup(RANKS, case.num_experts, case.topk)
    ranks = torch.arange(RANKS).repeat_interleave(torch.tensor(case.tokens))
    tokens = torch.cat([torch.arange(count) for count in case.tokens])
    found: list[list[int]] = route(
        parse_routing(case.routing), group, seed=case.seed, ranks=ranks, tokens=tokens
    ).tolist()
    return found


@pytest.fixture(scope="module", params=["sglang", "vllm", "vllm-released"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder, name = tmp_path_factory.mktemp("wheel"), request.param
    if name == "sglang":
        return name, slim_wheel(folder)
    return "vllm", vllm_wheel(folder, released=name == "vllm-released")


def test_every_dispatch_is_recorded_with_its_routing_and_the_verdict_stays(
    program: tuple[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "capture"
    case, outcome = captured(folder, *program, Settings("", every=1, weights=True), repeats=3, numerics="gaussian")
    assert outcome.judgement.verdict is Verdict.PASS, outcome.judgement
    assert outcome.resolved is not None
    found = read_capture(str(folder))
    assert found.notes == []
    assert found.violations == []
    assert len(found.slices) == 3
    assert found.header.weighed
    workload = workload_for(case, torch.device("cpu"))
    sent = torch.cat([workload.tokens(rank).weights for rank in range(RANKS)]).tolist()
    for one in found.slices.values():
        assert one.ids.tolist() == routed(case)
        assert one.tokens.tolist() == TOKENS
        assert one.received(case.num_experts).tolist() == list(outcome.resolved.traffic.total_recv)
        assert one.weights is not None
        assert one.weights.tolist() == sent
    assert (found.header.num_experts, found.header.topk, found.header.ep_size) == (8, 4, RANKS)


def test_violations_of_sglangs_own_cut_are_named_and_run_again(
    program: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if program[0] != "sglang":
        pytest.skip("vLLM cuts nothing")
    folder, out = tmp_path / "capture", tmp_path / "traffic.safetensors"
    values: dict[str, Any] = {"limit": "max-recv-1", "policy": "unchecked", "routing": "zipf:1.2", "seed": 3}
    _, outcome = captured(folder, *program, Settings("", every=1), **values)
    assert outcome.judgement.verdict is Verdict.UNDER_LIMIT
    assert outcome.resolved is not None
    rows, limit = outcome.resolved.traffic.total_recv, outcome.resolved.limit
    found = read_capture(str(folder))
    over = [(rank, most, limit) for rank, most in enumerate(rows) if limit is not None and most > limit]
    assert over
    assert [one[2:] for one in found.violations if one.step == 0] == over
    assert main(["trace", "convert", str(folder), f"--out={out}"]) == 0
    told = capsys.readouterr().out
    assert f"{len(found.violations)} times a rank received more rows than its limit" in told
    assert f"--routing trace:{out}@0.0 --tokens 5,0,9,7 --limit {limit} --policy unchecked" in told
    layer = [f"--{name.replace('_', '-')}={value}" for name, value in FREE.items() if name != "model"]
    traffic = [f"--routing=trace:{out}@0.0", f"--tokens={','.join(map(str, TOKENS))}", f"-n={RANKS}"]
    again = ["run", *layer, *traffic, f"--limit={limit}", "--policy=unchecked", f"--out={tmp_path / 'out'}"]
    assert main([*again, f"--bundle={tmp_path / 'bundles'}"]) == 1
    told = capsys.readouterr().out
    assert f"UNDER_LIMIT (emulated: collective for mori, reference for aiter): rank {over[0][0]} receives" in told
    out.unlink()
    (bundle,) = (tmp_path / "bundles").iterdir()
    assert main(["replay", str(bundle), f"--out={tmp_path / 'again'}"]) == 0
    assert "reproduced here (emulated" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_hidden_states_of_a_violation_run_and_replay_with_generated_experts(
    program: tuple[str, str], dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if program[0] != "sglang" and dtype == "fp8":
        pytest.skip("vLLM quantises within its call, and its hidden states are taken before")
    folder, out = tmp_path / "capture", tmp_path / "traffic.safetensors"
    settings = Settings("", every=1000, limit=2, violations=True, most_tensor_bytes=16 << 20)
    case, _ = captured(folder, *program, settings, numerics="gaussian", dispatch_dtype=dtype)
    found = read_capture(str(folder))
    assert found.notes == []
    assert (0, 0) in found.header.recorded
    workload = workload_for(case, torch.device("cpu"))
    sent = torch.cat([workload.tokens(rank).hidden for rank in range(RANKS)])
    tensors = found.slices[0, 0].tensors
    assert tensors is not None
    kept = torch.cat([torch.from_numpy(part.copy()).view(sent.dtype) for part in tensors.parts])
    assert torch.equal(kept.view(torch.uint8), sent.view(torch.uint8))
    assert main(["trace", "convert", str(folder), f"--out={out}"]) == 0
    layer = [f"--{name.replace('_', '-')}={value}" for name, value in FREE.items() if name != "model"]
    layer += [f"--dispatch-dtype={dtype}", *([f"--fp8-format={case.fp8_format}"] if dtype == "fp8" else [])]
    traffic = [f"--routing=trace:{out}@0.0", f"--tokens={','.join(map(str, TOKENS))}", f"-n={RANKS}"]
    again = ["run", *layer, *traffic, "--numerics=gaussian", "--require=tolerance", f"--out={tmp_path / 'out'}"]
    capsys.readouterr()
    if dtype == "bf16":
        assert main(again) == 0
        assert "warning: gaussian inputs are recorded tokens with generated experts" in capsys.readouterr().out
        return
    assert main([*again, "--inject=zero-rows:rank=2", f"--bundle={tmp_path / 'bundles'}"]) == 1
    out.unlink()
    (bundle,) = (tmp_path / "bundles").iterdir()
    assert bundle.stat().st_mode & 0o777 == 0o700
    assert (bundle / "routing.safetensors").stat().st_mode & 0o777 == 0o600
    capsys.readouterr()
    assert main(["replay", str(bundle), f"--out={tmp_path / 'again'}"]) == 0
    assert "reproduced here (emulated" in capsys.readouterr().out
    assert "recorded tokens with generated experts" in (tmp_path / "again" / "results.jsonl").read_text()
