"""The comparison with other packages' experts: who is here, who is right, and measurements in turn."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from distbench.experts.quantized_weights import QuantizedWeights
from distbench.experts.triton.config import LayerShape, Quant
from distbench.tools.tune.trial import make_layer

SCRIPTS = str(Path(__file__).parents[3] / "scripts")
SHAPE = LayerShape(num_experts=8, num_local_experts=4, hidden_size=256, intermediate_size=128, topk=4)


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(SCRIPTS)
    import bench_peers_found  # noqa: PLC0415 - lies in scripts/

    return bench_peers_found


@pytest.fixture
def bench(found: Any) -> Any:  # noqa: ARG001 - makes the folder known
    import bench_peers  # noqa: PLC0415 - lies in scripts/

    return bench_peers


def problem(found: Any, quant: Quant, rows: int = 40, numerics: str = "gaussian") -> tuple[Any, Tensor | None]:
    shape = msgspec.structs.replace(SHAPE, quant=quant)
    layer = make_layer(shape, numerics, "cpu")
    batch = layer.received(rows)
    local = layer.local
    quantized = QuantizedWeights().of(local.w1, local.w2) if quant == "fp8" else None
    return found.Problem(shape, batch, local, quantized), layer.workload.expected_rows(0, batch)


@pytest.mark.parametrize("quant", ["bf16", "fp8"])
def test_reference_is_the_oracle_of_exact_inputs(found: Any, quant: Quant) -> None:
    made, expected = problem(found, quant, numerics="exact")
    assert expected is not None
    error = (found.reference(made) - expected.float()).norm() / expected.float().norm()
    assert error < (1e-3 if quant == "bf16" else 6e-2)  # the reference keeps the intermediate in float32


@pytest.mark.parametrize(("peer", "quant"), [("vllm", "bf16"), ("vllm-deep-gemm", "fp8"), ("sglang", "bf16")])
def test_peer_that_is_not_installed_is_named_with_its_module(
    found: Any, peer: str, quant: Quant, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("vllm", "sglang"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(found.Absent, match=peer.partition("-")[0]):
        found.PEERS[peer](problem(found, quant)[0])


def grouped(rows: Tensor, weights: Tensor, output: Tensor, owner: Tensor) -> None:
    for place, expert in enumerate(owner.tolist()):
        output[place] = rows[place].float() @ weights[expert].float().T


def test_deep_gemm_is_given_rows_in_its_layout_and_is_right(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gemm = SimpleNamespace(get_mk_alignment_for_contiguous_layout=lambda: 16, m_grouped_bf16_gemm_nt_contiguous=grouped)
    monkeypatch.setitem(sys.modules, "deep_gemm", gemm)
    made, _ = problem(found, "bf16")
    call = found.PEERS["deep-gemm"](made)
    expected = found.reference(made)
    assert float((call() - expected).norm() / expected.norm()) < 1e-2
    with pytest.raises(found.Absent, match="bf16"):
        found.PEERS["deep-gemm"](problem(found, "fp8")[0])


def test_peer_that_computes_something_else_is_not_measured(
    bench: Any, found: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made, _ = problem(found, "bf16")
    right = found.reference(made)
    monkeypatch.setattr(torch, "tensor", lambda *_, **__: None)
    monkeypatch.setattr(bench, "run", lambda *_: right)
    monkeypatch.setattr(bench, "in_turn", lambda *_: ([2.0, 3.0, 2.0], [4.0, 4.0, 5.0]))

    def absent(_: object) -> None:
        message = "no such package"
        raise found.Absent(message)

    peers = {"good": lambda _: lambda: right, "bad": lambda _: lambda: 2 * right, "gone": absent, "broken": lambda _: 1}
    monkeypatch.setattr(bench, "PEERS", peers)
    wrong: list[str] = []
    triton = SimpleNamespace(selection=lambda _: SimpleNamespace(label="kernel"))
    measured = bench.Bench("layer", triton, made, 3, wrong).measure([*peers])
    assert [(one.peer, one.ratio) for one in measured] == [("good", 0.5)]
    assert [line.partition(" is off")[0] for line in wrong] == ["layer 40 rows: bad"]
    printed = capsys.readouterr().out
    assert "gone NOT MEASURED: no such package" in printed
    assert "broken FAILED: TypeError" in printed


def test_ours_and_the_peer_take_turns_with_a_flush_before_each(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    class Flush:
        def zero_(self) -> None:
            told.append("flush")

    def time(replay: str) -> float:
        told.append(replay)
        return float(len(told))

    monkeypatch.setattr(torch, "empty", lambda *_, **__: Flush())
    monkeypatch.setattr(bench, "capture", lambda call, **_: call)
    monkeypatch.setattr(bench, "time_us", time)
    ours, theirs = bench.in_turn("ours", "theirs", 2)
    assert told[::2] == ["flush"] * 10
    assert told[1::2] == ["theirs", "ours", "ours", "theirs"] * 2 + ["theirs", "ours"]
    assert (ours, theirs) == ([14.0, 20.0], [16.0, 18.0])
