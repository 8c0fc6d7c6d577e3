"""Hidden states of violations: of the violating layer alone, bit for bit, bounded, private, where asked for."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from distbench.capture import recent_tensors
from distbench.capture.recorder import Dispatch, Recorder
from distbench.capture.settings import Place, Settings
from distbench.cli.main import main
from distbench.tools.recorded.captured import Capture, read_capture
from distbench.workload.quantize import quantize_fp8_blocks
from distbench.workload.trace_file import Slice, read_header, read_tensors

E, K, W, LAYERS, H, MOST = 16, 4, 2, 3, 256, 8
ENOUGH = 8 << 20


class Layer:
    """A dispatcher of one layer on one rank."""


class Server:
    """Ranks in one process; a step dispatches drawn tokens in each layer, whose hidden states are kept in `sent`."""

    def __init__(self, folder: Path, kind: str = "bf16", most: int = ENOUGH) -> None:
        settings = Settings(str(folder), every=1000, violations=True, most_tensor_bytes=most)
        self.recorders = [Recorder(settings, "test 1") for _ in range(W)]
        self.layers = [[Layer() for _ in range(LAYERS)] for _ in range(W)]
        self.kind, self.steps = kind, 0
        self.sent: dict[tuple[int, int], list[tuple[Tensor, Tensor | None]]] = {}
        self._random = np.random.default_rng(0)

    def step(
        self, tokens: list[int], over: int | None = None, change: Callable[[Any, Any], None] | None = None
    ) -> None:
        """One step, with a violation in layer `over`; `change` alters a dispatch's ids and hidden states."""
        for layer in range(LAYERS):
            ids = self._random.random((sum(tokens), E)).argsort(axis=1)[:, :K].astype(np.int32)
            hidden = torch.from_numpy(self._random.standard_t(2, (sum(tokens), H))).bfloat16()
            if change is not None:
                change(ids, hidden)
            used = (ids != -1).any(axis=1)
            counts = [int(part.sum()) for part in np.split(used, np.cumsum(tokens)[:-1])]
            rows = Slice(ids[used], np.array(counts)).received(E)
            first = 0
            for rank, count in enumerate(tokens):
                part = slice(first, first + count)
                first += count
                states = self._as_sent(hidden[part])
                self.sent.setdefault((self.steps, layer), []).append(tuple(map(copied, states)))  # type: ignore[arg-type]
                received = torch.tensor([rows[rank]]).int(), 1 if layer == over else 1000
                self._dispatch(rank, layer, ids[part], states, received)
        self.steps += 1

    def _as_sent(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.kind == "bf16":
            return hidden.clone(), None
        if self.kind == "int8":
            return hidden.to(torch.int8), None
        return quantize_fp8_blocks(hidden, getattr(torch, f"float8_{self.kind}"))

    def _dispatch(self, rank: int, layer: int, ids: Any, states: Any, received: tuple[Tensor, int]) -> None:
        weights, place = torch.full(ids.shape, 0.25), Place(rank, W, E, K)
        sent = Dispatch(torch.from_numpy(ids), weights, *received, lambda: (place, MOST), states)
        self.recorders[rank].see(self.layers[rank][layer], lambda: sent)
        states[0].view(torch.uint8).zero_()  # the program uses its memory again

    def end(self) -> None:
        for recorder in self.recorders:
            recorder.end()


def copied(part: Tensor | None) -> Tensor | None:
    return None if part is None else part.clone()


def bits(part: Tensor) -> Any:
    return (
        part.view(torch.int16).numpy().view(np.uint16) if part.element_size() == 2 else part.view(torch.uint8).numpy()
    )


def check(found: Capture, server: Server, place: tuple[int, int]) -> None:
    tensors, sent = found.slices[place].tensors, server.sent[place]
    assert tensors is not None
    assert tensors.kind == server.kind
    assert (np.concatenate(tensors.parts) == np.concatenate([bits(hidden) for hidden, _ in sent])).all()
    for part, (_, scales) in zip(tensors.scales, sent, strict=False):
        assert scales is not None
        assert (part == scales.numpy()).all()


def counts(folder: Path, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"rank-{rank:05d}.json").read_text())
    return found


@pytest.mark.parametrize("kind", ["bf16", "e4m3fn", "e4m3fnuz"])
def test_the_violating_layer_of_all_ranks_is_kept_bit_for_bit_and_converted(tmp_path: Path, kind: str) -> None:
    folder, server = tmp_path / "c", Server(tmp_path / "c", kind)
    before = os.umask(0)
    try:
        for step in range(6):
            server.step([3, step], over=1 if step == 4 else None)
        server.end()
    finally:
        os.umask(before)
    found = read_capture(str(folder))
    assert found.notes == []
    assert found.header.recorded == {(4, 1)}
    check(found, server, (4, 1))
    files = [path for path in folder.iterdir() if ".tensors-" in path.name or "wanted" in path.name]
    assert {path.name for path in files} == {
        "wanted-4.1",
        *(f"rank-0000{rank}.tensors-4.1.safetensors" for rank in range(W)),
    }
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    assert [counts(folder, rank)["tensors"] for rank in range(W)] == [1, 1]
    out = tmp_path / "t.safetensors"
    assert main(["trace", "convert", str(folder), f"--out={out}"]) == 0
    assert out.stat().st_mode & 0o777 == 0o600
    header = read_header(str(out))
    kept = read_tensors(header, 4, 1, len(found.slices[4, 1].ids))
    assert kept is not None
    assert (kept.parts[0] == np.concatenate([bits(hidden) for hidden, _ in server.sent[4, 1]])).all()
    assert main(["trace", "convert", str(folder), f"--out={out}", "--no-tensors"]) == 0
    assert read_header(str(out)).recorded == frozenset()


def test_commands_name_the_run_with_the_hidden_states(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = Server(tmp_path / "c", "e4m3fn")
    server.step([2, 2], over=2)
    server.end()
    assert main(["trace", "convert", str(tmp_path / "c"), f"--out={tmp_path / 't.safetensors'}"]) == 0
    told = capsys.readouterr().out
    assert "t.safetensors@0.2 --tokens 2,2 --limit 1 --policy unchecked --bundle bundles --dispatch-dtype fp8" in told
    assert "1 with the e4m3fn hidden states of users' tokens, 256 columns (@0.2 is the first)" in told


def test_nothing_is_kept_without_being_asked_for(tmp_path: Path) -> None:
    server = Server(tmp_path / "c", most=0)
    server.step([3, 3], over=1)
    server.end()
    assert not [path for path in (tmp_path / "c").iterdir() if ".tensors-" in path.name or "wanted" in path.name]
    assert "tensors" not in counts(tmp_path / "c", 0)
    assert not any(recorder._rooms for recorder in server.recorders)  # noqa: SLF001 - no memory either


def test_rows_of_padding_are_dropped_whatever_is_in_them(tmp_path: Path) -> None:
    def pad(ids: Any, hidden: Tensor) -> None:
        ids[[1, 5]] = -1
        hidden[[1, 5]] = float("nan")

    server = Server(tmp_path / "c")
    server.step([3, 3], over=0, change=pad)
    server.end()
    found = read_capture(str(tmp_path / "c"))
    assert found.notes == []
    tensors = found.slices[0, 0].tensors
    assert tensors is not None
    sent = np.concatenate([bits(hidden) for hidden, _ in server.sent[0, 0]])
    assert (np.concatenate(tensors.parts) == sent[[0, 2, 3, 4]]).all()


def test_files_and_memory_are_bounded_and_what_is_cut_is_counted_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    most = 4 * MOST * H * 2
    server = Server(tmp_path / "c", most=most)
    for _ in range(30):
        server.step([MOST, 1], over=0)
        while not all(recorder._rooms for recorder in server.recorders):  # noqa: SLF001 - its one room is lent
            time.sleep(0.001)
    server.end()
    folder = tmp_path / "c"
    assert 0 < sum(path.stat().st_size for path in folder.glob("rank-00000.tensors-*")) < most * 1.25
    told = counts(folder, 0)
    assert told["tensors"] + told["tensors_lost"] == 30
    assert told["tensors_lost"] >= 26
    assert capsys.readouterr().err.count("MiB of hidden states of this rank, and gets no more") >= 1
    notes = read_capture(str(folder)).notes
    assert any("dispatches were asked for and no more in memory, or beyond the size allowed" in note for note in notes)
    kept = server.recorders[0]._writer._tensors  # type: ignore[union-attr]  # noqa: SLF001 - its memory
    assert kept._bytes <= most  # noqa: SLF001


def test_a_dispatch_larger_than_the_size_allowed_and_other_formats_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, kind, most, note in (
        ("large", "bf16", 100, "came while the writer was behind, or had no room"),
        ("int8", "int8", ENOUGH, "are of another format than bf16 or fp8 with a scale for 128 columns"),
    ):
        server = Server(tmp_path / name, kind, most)
        server.step([3, 3], over=1)
        server.end()
        found = read_capture(str(tmp_path / name))
        assert len(found.violations) == W
        assert f"hidden states of {LAYERS * W} dispatches {note}" in found.notes
        assert found.header.recorded == frozenset()
    assert "hidden states are not recorded: torch.int8 with scales None" in capsys.readouterr().err


def test_a_rank_that_hears_of_it_too_late_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recent_tensors, "_LOOK_SECONDS", 1e9)
    server = Server(tmp_path / "c")
    server.step([3, 3], over=1)
    server.end()
    for path in (tmp_path / "c").glob("rank-00001.tensors*"):
        path.unlink()
    found = read_capture(str(tmp_path / "c"))
    assert found.header.recorded == frozenset()
    assert "hidden states of step 0, layer 1 are left out: 1 of 2 ranks have them" in found.notes


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("nan", "token 3 has a hidden state of at most nan"),
        ("rows", r"hidden is U16 \[2, 256\], the format has U16 \[3, 256\]"),
        ("dtype", "hidden is F64"),
        ("flat", "hidden is U16"),
        ("empty", "hidden is None None"),
        ("kind", "are no hidden states of version 1"),
        ("width", "ranks have other formats or sizes"),
    ],
)
def test_damaged_hidden_states_are_left_out_and_named(tmp_path: Path, damage: str, reason: str) -> None:
    server = Server(tmp_path / "c")
    server.step([3, 3], over=1)
    server.end()
    path = tmp_path / "c" / "rank-00001.tensors-0.1.safetensors"
    hidden = load_file(path)["hidden"]
    metadata = {"format": "distbench-capture", "version": "1", "kind": "e5m2" if damage == "kind" else "bf16"}
    hidden[0, 0] = 0x7FC0 if damage == "nan" else hidden[0, 0]
    changed = {
        "rows": hidden[1:],
        "dtype": hidden.astype(float),
        "flat": hidden.ravel(),
        "width": hidden[:, :128].copy(),
    }
    name = "other" if damage == "empty" else "hidden"
    save_file({name: changed.get(damage, hidden)}, path, metadata)
    found = read_capture(str(tmp_path / "c"))
    assert found.header.recorded == frozenset()
    (note,) = found.notes
    assert note.startswith("hidden states of step 0, layer 1 are left out: ")
    assert re.search(reason, note), note
