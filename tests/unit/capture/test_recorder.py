"""A capture records what its settings ask for, is bounded and private, and never ends the process that it is in."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from distbench.capture import hooks, host_buffers, sglang, writer
from distbench.capture.part_file import FORMAT
from distbench.capture.recorder import Dispatch, Recorder
from distbench.capture.settings import Place, Settings, from_environment
from distbench.cli.main import main
from distbench.errors import InvalidCase
from distbench.tools.recorded.captured import read_capture
from distbench.workload.trace_file import Slice

E, K, W, LAYERS = 16, 4, 2, 3


class Layer:
    """A dispatcher of one layer on one rank."""


class Server:
    """Ranks in one process, a recorder each; every step dispatches drawn tokens in each layer."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.recorders = [Recorder(Settings(str(folder), **settings), "test 1") for _ in range(W)]
        self.layers = [[Layer() for _ in range(LAYERS)] for _ in range(W)]
        self.sent: dict[tuple[int, int], Slice] = {}
        self._random = np.random.default_rng(0)

    def step(self, tokens: list[int], limit: int = 0, *, wrong: int = 0) -> None:
        """One step; `wrong` is added to the rows that rank 0 says it received."""
        number = len(self.sent) // LAYERS
        for layer in range(LAYERS):
            ids = self._random.random((sum(tokens), E)).argsort(axis=1)[:, :K].astype(np.int32)
            one = self.sent[number, layer] = Slice(ids, np.array(tokens))
            rows = one.received(E)
            rows[0] += wrong
            for rank, part in enumerate(np.split(ids, np.cumsum(tokens)[:-1])):
                self._dispatch(rank, layer, part, int(rows[rank]), limit)

    def _dispatch(self, rank: int, layer: int, ids: Any, rows: int, limit: int) -> None:
        weights = torch.full(ids.shape, 0.25)
        place = Place(rank, W, E, K)
        sent = Dispatch(torch.from_numpy(ids), weights, torch.tensor([rows]).int(), limit, lambda: (place, 8))
        self.recorders[rank].see(self.layers[rank][layer], lambda: sent)

    def end(self) -> None:
        for recorder in self.recorders:
            recorder.end()


def counts(folder: Path, rank: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"rank-{rank:05d}.json").read_text())
    return found


@pytest.mark.parametrize("every", [1, 2, 3])
def test_each_sampled_step_is_recorded_in_every_layer(tmp_path: Path, every: int) -> None:
    server = Server(tmp_path / "c", every=every)
    for step in range(6):
        server.step([step, 5 - step])
    server.end()
    found = read_capture(str(tmp_path / "c"))
    assert sorted(found.slices) == [(step, layer) for step in range(0, 6, every) for layer in range(LAYERS)]
    for place, one in found.slices.items():
        assert one.ids.tolist() == server.sent[place].ids.tolist()
        assert one.tokens.tolist() == server.sent[place].tokens.tolist()
    assert (found.notes, found.violations) == ([], [])


def test_steps_next_to_a_violation_are_recorded_on_all_ranks_although_they_are_not_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_LOOK_SECONDS", 0.0)
    server = Server(tmp_path / "c", every=1000, violations=True)
    for step in range(40):
        server.step([3, 3], limit=1 if step == 20 else 100)
    deadline = time.monotonic() + 20
    while len(list((tmp_path / "c").glob("violated-*"))) != 1:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    server.end()
    found = read_capture(str(tmp_path / "c"))
    assert sorted({step for step, _ in found.slices}) == [0, 19, 20, 21]
    assert {one.step for one in found.violations} == {20}
    assert all(one.total_recv > one.limit == 1 for one in found.violations)
    assert found.notes == []


def test_a_limit_of_the_settings_is_that_of_violations(tmp_path: Path) -> None:
    server = Server(tmp_path / "c", every=1, limit=2)
    server.step([3, 3], limit=100)
    server.end()
    assert {one.limit for one in read_capture(str(tmp_path / "c")).violations} == {2}


def test_files_and_folder_are_their_owners_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        server = Server(tmp_path / "c", every=1, violations=True)
        server.step([3, 3], limit=1)
        server.end()
    finally:
        os.umask(before)
    assert (tmp_path / "c").stat().st_mode & 0o777 == 0o700
    names = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "c").iterdir()}
    assert set(names.values()) == {0o600}
    assert {"rank-00000.json", "rank-00001.000000.safetensors", "violated-0"} <= names.keys()


def test_size_is_bounded_and_what_was_dropped_is_counted_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = Server(tmp_path / "c", every=1, most_bytes=20_000)
    for _ in range(200):
        server.step([4, 4])
    server.end()
    files = list((tmp_path / "c").glob("rank-00000.*.safetensors"))
    assert 0 < sum(path.stat().st_size for path in files) < 22_000
    assert counts(tmp_path / "c")["over_size"] + counts(tmp_path / "c")["recorded"] == 200 * LAYERS
    assert capsys.readouterr().err.count("gets no more") == W
    assert "dispatches not recorded: beyond the size allowed" in read_capture(str(tmp_path / "c")).notes[0]


def test_a_writer_that_is_behind_costs_dispatches_and_no_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()

    class Gated(SimpleQueue[Any]):
        def get(self, block: bool = True, timeout: float | None = None) -> Any:
            assert gate.wait(20)
            return super().get(block, timeout)

    monkeypatch.setattr(writer, "SimpleQueue", Gated)
    monkeypatch.setattr(host_buffers, "_BYTES", 1024)
    monkeypatch.setattr(host_buffers, "_LEAST", 3)
    server = Server(tmp_path / "c", every=1)
    for _ in range(50):
        server.step([4, 4])
    gate.set()
    server.end()
    told = counts(tmp_path / "c")
    assert told["behind"] > 0
    assert told["behind"] + told["recorded"] == 50 * LAYERS


def test_a_dispatch_that_is_captured_into_a_graph_is_counted_and_allocates_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    capturing = True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    server = Server(tmp_path / "c", every=1)
    layer: Any = SimpleNamespace(ids=SimpleNamespace(is_cuda=True))
    for recorder, layers in zip(server.recorders, server.layers, strict=True):
        for one in layers:
            recorder.see(one, lambda: layer)
        assert not recorder.ended
    assert not (tmp_path / "c").exists()
    capturing = False
    server.step([1, 1])
    server.end()
    assert counts(tmp_path / "c")["in_graphs"] == LAYERS
    (note,) = read_capture(str(tmp_path / "c")).notes
    assert note == f"{W * LAYERS} dispatches not recorded: while a graph was captured, whose replays are not seen"


@pytest.mark.parametrize("how", ["file in the way", "open to others", "earlier capture"])
def test_an_unusable_folder_ends_the_capture_with_one_line(
    tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "c"
    if how == "file in the way":
        folder.write_text("")
    else:
        folder.mkdir(mode=0o755 if how == "open to others" else 0o700)
        for rank in range(W):
            (folder / f"rank-{rank:05d}.json").write_text("{}")
    server = Server(folder, every=1)
    for _ in range(3):
        server.step([1, 1])
    assert all(recorder.ended for recorder in server.recorders)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == W
    assert all(line.startswith("distbench capture: ended, the server goes on: ") for line in lines)


def test_of_two_processes_of_one_rank_the_second_ends_its_capture_and_the_first_keeps_its_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = Server(tmp_path / "c", every=1), Server(tmp_path / "c", every=1)
    first.step([2, 3])  # neither has written a part when the second begins
    second.step([4, 4])
    assert all(recorder.ended for recorder in second.recorders)
    assert capsys.readouterr().err.count("has another capture of rank") == W
    first.end()
    found = read_capture(str(tmp_path / "c")).slices
    assert [one.tokens.tolist() for one in found.values()] == [[2, 3]] * LAYERS


def test_a_folder_that_takes_no_file_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, _: bytes) -> None:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("distbench.capture.part_file.os.fdopen", lambda descriptor, _: closing(descriptor, Full()))
        full = Server(tmp_path / "c", every=1)
        full.step([1, 1])
        assert all(recorder.ended for recorder in full.recorders)
    assert not list((tmp_path / "c").iterdir())


@contextlib.contextmanager
def closing(descriptor: int, file: Any) -> Iterator[Any]:
    try:
        yield file
    finally:
        os.close(descriptor)


def test_parts_have_their_size_although_dispatches_never_cease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()

    class Gated(SimpleQueue[Any]):
        def get(self, block: bool = True, timeout: float | None = None) -> Any:
            assert gate.wait(20)
            return super().get(block, timeout)

    monkeypatch.setattr(writer, "SimpleQueue", Gated)
    monkeypatch.setattr(writer, "_PART_BYTES", 2048)
    server = Server(tmp_path / "c", every=1)
    for _ in range(40):
        server.step([4, 4])
    gate.set()  # all of them are there at once
    server.end()
    parts = list((tmp_path / "c").glob("rank-00000.*.safetensors"))
    assert len(parts) > 3
    assert max(load_file(part)["ids"].nbytes for part in parts) <= 2048


def test_an_error_in_a_step_does_not_wait_for_a_slow_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    monkeypatch.setattr(writer, "write_private", lambda *_: gate.wait(20))
    monkeypatch.setattr(writer, "_PART_BYTES", 1)
    server = Server(tmp_path / "c", every=1)
    server.step([1, 1])
    began = time.monotonic()
    for recorder, layers in zip(server.recorders, server.layers, strict=True):
        recorder.see(layers[0], lambda: Dispatch(*[None] * 5))  # type: ignore[arg-type]
        assert recorder.ended
    assert time.monotonic() - began < 5
    gate.set()


def test_an_error_of_the_writer_ends_the_capture_and_stands_in_the_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> bytes:
        message = "no space\nleft"
        raise OSError(28, message)

    monkeypatch.setattr(writer, "part_bytes", broken)
    monkeypatch.setattr(writer, "_PART_BYTES", 1)
    server = Server(tmp_path / "c", every=1)
    server.step([1, 1])
    deadline = time.monotonic() + 20
    while not all(recorder.ended for recorder in server.recorders):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    server.step([1, 1])
    server.end()
    for thread in threading.enumerate():
        if thread.name == "distbench-capture":
            thread.join(20)
    assert "no space left" in counts(tmp_path / "c")["error"].replace("\n", " ")
    assert len(capsys.readouterr().err.splitlines()) == W


def test_copies_stand_although_the_model_reuses_its_memory(tmp_path: Path) -> None:
    recorder, layer = Recorder(Settings(str(tmp_path / "c"), every=1), "test"), Layer()
    ids, rows = torch.zeros(2, K, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    for step in range(20):
        with torch.inference_mode(mode=step % 2 == 0):
            ids.copy_(torch.tensor([[step % 4, 4, 5, 6]] * 2))
            rows.fill_(2)
            dispatch = Dispatch(ids, ids.float(), rows, 0, lambda: (Place(0, 1, 8, K), 2))
            recorder.see(layer, lambda: dispatch)  # noqa: B023 - called at once
            ids.fill_(7)
            rows.zero_()  # as MoRI's combine does
    recorder.end()
    found = read_capture(str(tmp_path / "c")).slices
    assert [one.ids.tolist() for one in found.values()] == [[[step % 4, 4, 5, 6]] * 2 for step in range(20)]


class Dispatcher:
    """A class with the method and the parts that SGLang's capture reads."""

    def dispatch_b(self) -> Any:
        return SimpleNamespace(
            origin_topk_ids=torch.tensor([[0, 1]]),
            origin_topk_weights=torch.ones(1, 2),
            num_recv_tokens_per_expert=torch.tensor([1]),
            recv_cap=0,
        )

    def _get_impl(self) -> Any:
        return SimpleNamespace(num_experts=4, num_local_experts=4, router_topk=2, num_max_dispatch_tokens_per_rank=8)


def get_parallel() -> Any:
    return SimpleNamespace(moe_ep_rank=0)


def test_nothing_is_installed_before_and_after_the_context(tmp_path: Path) -> None:
    before = vars(Dispatcher)["dispatch_b"]
    with sglang.recording(Dispatcher, Settings(str(tmp_path / "c"), every=1)):
        assert vars(Dispatcher)["dispatch_b"] is not before
        Dispatcher().dispatch_b()
    assert vars(Dispatcher)["dispatch_b"] is before
    assert len(read_capture(str(tmp_path / "c")).slices) == 1


def test_a_dispatcher_with_other_fields_ends_the_capture_and_returns_its_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Other:
        def dispatch_b(self) -> str:
            return "rows"

    with sglang.recording(Other, Settings(str(tmp_path / "c"), every=1)):
        assert [Other().dispatch_b() for _ in range(3)] == ["rows"] * 3
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("environ", "told"),
    [
        ({}, ""),
        ({"DISTBENCH_CAPTURE": "c"}, "nothing is recorded by process"),  # there is no such package
        ({"DISTBENCH_CAPTURE": "c", "DISTBENCH_CAPTURE_EVERY": "0"}, "DISTBENCH_CAPTURE_EVERY='0'"),
        ({"DISTBENCH_CAPTURE": "c", "DISTBENCH_CAPTURE_WEIGHTS": "yes"}, "DISTBENCH_CAPTURE_WEIGHTS='yes'"),
    ],
)
def test_activation_follows_the_environment_and_raises_nothing(
    environ: dict[str, str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hooks.activate("no_such_server", "no_such_server.moe", "Dispatcher", sglang.recording, environ)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (1 if told else 0)
    assert told in "".join(lines)


def test_plugins_of_both_servers_do_nothing_and_load_nothing_without_the_variable() -> None:
    project = msgspec.toml.decode((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    groups = ("sglang.srt.plugins", "vllm.general_plugins")
    targets = [project["entry-points"][group]["distbench_capture"] for group in groups]
    code = (
        "import pkgutil, sys\n"
        f"[pkgutil.resolve_name(name)() for name in {targets}]\n"
        "print(sorted({'torch', 'numpy', 'sglang', 'vllm', 'safetensors'} & sys.modules.keys()))"
    )
    environ = {name: value for name, value in os.environ.items() if not name.startswith("DISTBENCH")}
    told = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert (told.stdout, told.stderr) == ("[]\n", "")


def test_environment_gives_all_settings() -> None:
    environ = {f"DISTBENCH_CAPTURE{name}": "2" for name in ("_EVERY", "_LIMIT", "_MIB")}
    environ |= {"DISTBENCH_CAPTURE": "/c", "DISTBENCH_CAPTURE_WEIGHTS": "1", "DISTBENCH_CAPTURE_VIOLATIONS": "1"}
    assert from_environment(environ) == Settings("/c", 2, weights=True, limit=2, violations=True, most_bytes=2 << 20)
    environ["DISTBENCH_CAPTURE_TENSORS_MIB"] = "3"
    found = from_environment(environ)
    assert found is not None
    assert found.most_tensor_bytes == 3 << 20
    del environ["DISTBENCH_CAPTURE_VIOLATIONS"]
    with pytest.raises(ValueError, match="set DISTBENCH_CAPTURE_VIOLATIONS=1 as well"):
        from_environment(environ)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("wrong rows", "their steps are not the same ones"),
        ("rank missing", f"nothing to convert; {LAYERS} dispatches left out: not of all {W} ranks"),
        ("cut", "cannot be read"),
        ("other format", "not a part of version 1"),
        ("ids", "the dispatches have"),
        ("twice", "twice"),
        ("far step", "a step or layer beyond"),
        ("too many", "200000 dispatches; a trace has at most"),
        ("counts", "rank-00001.json: Expected `int` >= 0"),
        ("empty", "no part of a capture"),
    ],
)
def test_damaged_captures_are_refused(tmp_path: Path, damage: str, reason: str) -> None:
    folder = tmp_path / "c"
    server = Server(folder, every=1)
    server.step([2, 3], wrong=1 if damage == "wrong rows" else 0)
    server.end()
    first = folder / "rank-00000.000000.safetensors"
    content = first.read_bytes()
    if damage in ("rank missing", "empty"):
        for path in folder.glob("rank-00001*" if damage == "rank missing" else "*"):
            path.unlink()
    elif damage == "cut":
        first.write_bytes(content[:-8])
    elif damage == "other format":
        first.write_bytes(content.replace(FORMAT.encode(), b"distbench-otherss"))
    elif damage == "ids":
        first.write_bytes(content.replace(b'"shape":[6,4]', b'"shape":[4,6]'))
    elif damage in ("far step", "too many"):
        tensors = load_file(first)
        tensors["slices"][0, 0] = 1 << 60
        if damage == "too many":  # of no token: nothing else bounds them
            tensors = {"slices": np.zeros((200_000, 5), dtype=np.int64), "ids": np.zeros((0, K), dtype=np.int32)}
        with safe_open(first, framework="numpy") as opened:
            save_file(tensors, first, opened.metadata())
    elif damage == "counts":
        (folder / "rank-00001.json").write_text('{"behind": -5}')
    elif damage == "twice":
        (folder / "rank-00000.000001.safetensors").write_bytes(content)
    with pytest.raises(InvalidCase, match=reason):
        read_capture(str(folder))


def place_of(rank: int) -> tuple[Place, int]:
    return Place(rank, W, E, K), 4


def same(sent: Dispatch) -> Dispatch:
    return sent


@pytest.mark.parametrize("kernel_skips", [True, False])
def test_rows_of_padding_are_dropped_and_those_that_reached_rank_0_are_named(
    tmp_path: Path, *, kernel_skips: bool
) -> None:
    recorders = [Recorder(Settings(str(tmp_path / "c"), every=1), "test") for _ in range(W)]
    for rank, recorder in enumerate(recorders):
        ids = torch.tensor([[0, 1, 2, 3 + rank], [-1] * K, [-1] * K])
        rows = torch.tensor([2 + (0 if kernel_skips else 2 * W) if rank == 0 else 0])
        sent = Dispatch(ids, ids.float(), rows, 0, partial(place_of, rank))
        recorder.see(Layer(), partial(same, sent))
        recorder.end()
    found = read_capture(str(tmp_path / "c"))
    assert found.slices[0, 0].ids.tolist() == [[0, 1, 2, 3], [0, 1, 2, 4]]
    told = "1 dispatch gave rank 0 the rows of padding (ids of -1) as well, which the trace lacks"
    assert found.notes == ([] if kernel_skips else [told])


def test_a_token_with_a_slot_of_its_own_left_out_costs_its_dispatch_alone(tmp_path: Path) -> None:
    recorder, layer = Recorder(Settings(str(tmp_path / "c"), every=1), "test"), Layer()
    for ids in ([[0, 1, 2, 3]], [[0, 1, 2, -1]]):
        sent = Dispatch(torch.tensor(ids), torch.ones(1, K), torch.tensor([1]), 0, lambda: (Place(0, 1, E, K), 4))
        recorder.see(layer, partial(same, sent))
    recorder.end()
    found = read_capture(str(tmp_path / "c"))
    assert list(found.slices) == [(0, 0)]
    assert found.notes == ["1 dispatch left out: a token has -1 beside experts, one twice, or one that there is not"]


def test_command_shows_and_converts_a_capture_for_advise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = Server(tmp_path / "c", every=1)
    for _ in range(5):
        server.step([3, 3], limit=4)
    server.end()
    out = str(tmp_path / "t.safetensors")
    assert main(["trace", "info", str(tmp_path / "c")]) == 0
    assert "16 experts, top-4, 2 ranks; 5 steps, 3 layers (0 to 2)" in capsys.readouterr().out
    assert main(["trace", "convert", str(tmp_path / "c"), f"--out={out}"]) == 0
    layer = ["--model=tiny", "--ep-size=2", f"--routing=trace:{out}", "--max-dispatch-tokens-per-rank=8", "--topk=4"]
    assert main(["advise", *layer, "--num-experts=16", "--limit=4"]) == 0
    assert "capture of test 1" in capsys.readouterr().out


_SERVER = """
import sys
from types import SimpleNamespace
import torch
from importlib.metadata import entry_points
from distbench.capture import sglang
sglang.activate()
from sglang.srt.layers.moe.token_dispatcher import moriep
moriep.RANK = int(sys.argv[1])
layers = [moriep.MoriEPDispatcher() for _ in range(2)]
for step in range(4):
    for layer in layers:
        layer.dispatch_b()
print("served")
"""
_MORIEP = """
from types import SimpleNamespace
import torch
def get_parallel():
    return SimpleNamespace(moe_ep_rank=RANK)
class MoriEPDispatcher:
    def dispatch_b(self):
        ids = torch.tensor([[0, 2], [1, 3]])
        return SimpleNamespace(origin_topk_ids=ids, origin_topk_weights=torch.full((2, 2), 0.5),
                               num_recv_tokens_per_expert=torch.tensor([4]), recv_cap=3)
    def _get_impl(self):
        return SimpleNamespace(num_experts=4, num_local_experts=2, router_topk=2, num_max_dispatch_tokens_per_rank=4)
"""


def test_processes_of_a_server_record_by_the_variable_alone_and_write_all_at_their_end(tmp_path: Path) -> None:
    place = tmp_path / "site/sglang/srt/layers/moe/token_dispatcher"
    place.mkdir(parents=True)
    (place / "moriep.py").write_text(_MORIEP)
    (tmp_path / "site/sglang-9.9.dist-info").mkdir()
    (tmp_path / "site/sglang-9.9.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 9.9\n")
    environ = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "DISTBENCH_CAPTURE": str(tmp_path / "c")}
    environ |= {"DISTBENCH_CAPTURE_EVERY": "2"}
    command = [sys.executable, "-c", _SERVER]
    ranks = [
        subprocess.Popen([*command, str(rank)], env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    assert [rank.communicate(timeout=60) for rank in ranks] == [("served\n", "")] * 2
    found = read_capture(str(tmp_path / "c"))
    assert found.header.source == "capture of sglang 9.9"
    assert sorted(found.slices) == [(0, 0), (0, 1), (2, 0), (2, 1)]
    assert len(found.violations) == 8
    assert found.notes == []
