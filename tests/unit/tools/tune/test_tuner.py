"""Tuning without a device: candidates that are kept, resumed tables, and compiler processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from distbench.cli import main
from distbench.errors import DistbenchError, Unsupported
from distbench.experts.base import ExpertWeights
from distbench.experts.triton.config import KernelConfig, LayerShape, TableRow, Tile
from distbench.experts.triton.table import Table, encode_table, load_table
from distbench.tools.tune import compilers, trial, tuner
from distbench.tools.tune.candidates import Family, First
from distbench.tools.tune.tuner import Tuner
from distbench.workload.batch import TokenBatch

SHAPE = LayerShape(num_experts=16, num_local_experts=4, hidden_size=256, intermediate_size=128, topk=4)
TILES = [Tile(n=n, k=64, stages=3, warps=4) for n in (32, 64, 128)]
FAMILY = Family(16, "reduce", [First(tile, gather=True) for tile in TILES], TILES)
CONFIG = FAMILY.config(FAMILY.first[0], TILES[0])


class FakeDevice:
    """Fake kernels with the oracle's bits or damaged ones; wider tiles are faster."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.damage: Callable[[KernelConfig, Tensor], object] = lambda *_: None
        self.notes: list[str] = []
        monkeypatch.setattr(tuner, "make_layer", partial(trial.make_layer, device="cpu"))
        monkeypatch.setattr(tuner, "TritonExperts", lambda _: None)
        monkeypatch.setattr(tuner, "run", self.run)
        monkeypatch.setattr(tuner, "graph_us", self.graph_us)

    def run(self, _: None, local: ExpertWeights, batch: TokenBatch, live: Tensor, config: KernelConfig) -> Tensor:
        del local, live
        rows = self.tuner.exact.workload.expected_rows(0, batch)
        assert rows is not None
        self.damage(config, rows)
        return rows

    def graph_us(self, call: Callable[[], object]) -> list[float]:
        assert isinstance(call, partial)
        config: KernelConfig = call.args[-1]
        return [1000.0 / config.stage1.n + 1000.0 / config.stage2.n]

    def tune(self) -> TableRow:
        self.tuner = Tuner(SHAPE, lambda *_: None, self.notes.append)
        return self.tuner.tune(8, [FAMILY])


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    return FakeDevice(monkeypatch)


def test_fastest_candidate_is_kept(device: FakeDevice) -> None:
    row = device.tune()
    assert (row.bucket, row.config, row.us) == (8, FAMILY.config(FAMILY.first[2], TILES[2]), 15.6)


def test_candidate_with_wrong_bits_is_dropped(device: FakeDevice) -> None:
    def damage(config: KernelConfig, rows: Tensor) -> None:
        if TILES[2] in (config.stage1, config.stage2):
            rows.view(torch.int16)[0, 0] ^= 1

    device.damage = damage
    assert device.tune().config == FAMILY.config(FAMILY.first[1], TILES[1])
    assert [note for note in device.notes if note.startswith("WRONG BITS")]


def test_candidate_that_the_device_refuses_is_dropped(device: FakeDevice) -> None:
    def damage(config: KernelConfig, _: Tensor) -> None:
        if config.stage2 == TILES[2]:
            message = "out of resource: shared memory"
            raise RuntimeError(message)

    device.damage = damage
    assert device.tune().config == FAMILY.config(FAMILY.first[2], TILES[1])
    assert any(note.startswith("refused") and note.endswith("shared memory") for note in device.notes)


def test_tuning_without_a_correct_candidate_writes_no_table(device: FakeDevice) -> None:
    device.damage = lambda _, rows: rows.neg_()
    with pytest.raises(Unsupported, match="no kernel gives the oracle's bits for 8 rows"):
        device.tune()

    def refuse(*_: object) -> None:
        message = "experts triton: hidden_size"
        raise Unsupported(message)

    device.damage = refuse
    with pytest.raises(Unsupported, match="hidden_size"):
        device.tune()


class FakeTuner:
    """Fake tuner that runs no trial, and stops at bucket `stop`."""

    tuned: list[int]
    stop = 0

    def __init__(self, *_: object) -> None:
        FakeTuner.tuned = []

    def tune(self, bucket: int, _: object) -> TableRow:
        if bucket == FakeTuner.stop:
            message = "stopped"
            raise Unsupported(message)
        FakeTuner.tuned.append(bucket)
        return TableRow(bucket=bucket, config=CONFIG, us=float(bucket))


@pytest.fixture
def tune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Fake H0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(compilers, "compile_all", lambda *_: None)
    monkeypatch.setattr(tuner, "Tuner", FakeTuner)
    monkeypatch.setattr(FakeTuner, "stop", 0)

    def call(*flags: str) -> int:
        return main.main(["tune", "--model=tiny", "--ep-size=4", f"--table={tmp_path / 'table.json'}", *flags])

    return call


def test_stopped_tuning_resumes_with_its_finished_buckets(tmp_path: Path, tune: Callable[..., int]) -> None:
    FakeTuner.stop = 128
    assert tune("--buckets=256,64,128") == 77
    assert [row.bucket for row in load_table(tmp_path / "table.json").rows] == [64, 256]
    FakeTuner.stop = 0
    assert tune("--buckets=64,128,256") == 0
    assert FakeTuner.tuned == [128]
    assert [row.bucket for row in load_table(tmp_path / "table.json").rows] == [64, 128, 256]


def test_tuning_does_not_resume_a_table_of_another_stage2_mode(
    tmp_path: Path, tune: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune("--buckets=64") == 0
    before = (tmp_path / "table.json").read_bytes()
    assert tune("--buckets=64,128", "--stage2=atomic") == 2
    assert "has rows whose stage 2 is reduce, and --stage2 is atomic; name another file" in capsys.readouterr().err
    assert (tmp_path / "table.json").read_bytes() == before


def test_tuning_does_not_resume_a_table_of_another_layer(
    tmp_path: Path, tune: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune("--buckets=64") == 0
    table: Table = msgspec.structs.replace(load_table(tmp_path / "table.json"), topk=2)
    (tmp_path / "table.json").write_bytes(encode_table(table))
    assert tune("--buckets=64,128") == 2
    assert "made for another layer" in capsys.readouterr().err


GIB = 1 << 30
WEIGHTS = 3 * 4 * 256 * 128


@pytest.mark.parametrize(
    ("quant", "free", "expected"),
    [
        ("bf16", 100 * GIB, 3),
        ("bf16", 2 * (GIB + 2 * WEIGHTS), 2),
        ("bf16", 2 * (GIB + 2 * WEIGHTS) - 1, 1),
        ("fp8", GIB + 3 * WEIGHTS, 1),
    ],
)
def test_number_of_compilers_is_limited_by_device_memory(
    monkeypatch: pytest.MonkeyPatch, quant: Any, free: int, expected: int
) -> None:
    asked = []

    def pool(processes: int, *_: object) -> AbstractContextManager[SimpleNamespace]:
        asked.append(processes)
        return nullcontext(SimpleNamespace(imap_unordered=lambda _, configs: configs))

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 100 * GIB))
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: SimpleNamespace(Pool=pool))
    shape = msgspec.structs.replace(SHAPE, quant=quant)
    compilers.compile_all(shape, [*FAMILY.configs(), *FAMILY.configs()], 8, lambda *_: None)
    assert asked == [expected]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (GIB, 100 * GIB))
    with pytest.raises(Unsupported, match=rf"a compiler needs about \d+ bytes of the GPU .*, {GIB} are free"):
        compilers.compile_all(shape, FAMILY.configs(), 8, lambda *_: None)


def test_compilers_that_cannot_start_end_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (100 * GIB, 100 * GIB))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(DistbenchError, match=r"tune: a compiler cannot start \(.+\); lower --processes"):
        compilers.compile_all(SHAPE, FAMILY.configs(), 1, lambda *_: None)
