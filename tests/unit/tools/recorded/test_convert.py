"""Conversion of what other programs record: every format gives the same trace, and hostile files are refused."""

from __future__ import annotations

import base64
import io
import json
import pickle
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from safetensors.numpy import save_file

from distbench.cli.main import main
from distbench.errors import InvalidCase
from distbench.tools.recorded.convert import convert
from distbench.tools.recorded.readers import read_parts
from distbench.tools.recorded.synthetic import drawn
from distbench.workload.routing import route
from distbench.workload.routing_spec import ExpertGroup, parse_routing
from distbench.workload.trace_file import read_header, read_slice

E, K, W = 16, 4, 4
STEPS, LAYERS, TOKENS = 2, 3, 8
IDS = np.random.default_rng(0).random((STEPS, LAYERS, TOKENS, E)).argsort(axis=-1)[..., :K]


WEIGHTS = np.full(IDS.shape, 0.25) + np.array([0.0625, -0.0625, 0.125, -0.125])
TWO_KINDS = b'{"step": 0, "layer": 0, "rank": 0, "ids": [[1]]}\n{"step": 1, "layer": 0, "rank": 0, "ids": [[1, 2]]}'


HALF_WEIGHED = (
    b'{"step": 0, "layer": 0, "rank": 0, "ids": [[1]], "weights": [[1.0]]}\n'
    b'{"step": 0, "layer": 0, "rank": 1, "ids": [[1]]}'
)


def sglang(folder: Path) -> list[str]:
    """Files as SGLang's recorder writes them per token: one a rank, dense layers and columns past k padded with -1."""
    paths = []
    for rank in range(W):
        records = []
        for step in range(STEPS):
            padded = torch.full((LAYERS + 1, 2, 8), -1, dtype=torch.int32)
            padded[1:, :, :K] = torch.from_numpy(IDS[step, :, 2 * rank : 2 * rank + 2]).int()
            record = {"forward_pass_id": step, "rank": rank, "gatherer_key": "primary", "input_ids": [1, 2]}
            records.append(record | {"positions": [0, 1], "forward_mode": 2, "topk_ids_of_layer": padded})
        paths.append(str(folder / f"expert_distribution_recorder_{rank}.pt"))
        torch.save({"records": records, "last_physical_to_logical_map": torch.zeros(1)}, paths[-1])
    return paths


def arrays(folder: Path) -> list[str]:
    np.save(folder / "ids.npy", IDS.astype(np.int16))
    return [str(folder / "ids.npy")]


def tensors(folder: Path) -> list[str]:
    weights = {"weights": WEIGHTS.astype(np.float16)}
    save_file({"ids": np.ascontiguousarray(IDS)} | weights, folder / "ids.safetensors")
    return [str(folder / "ids.safetensors")]


def entries() -> list[tuple[int, int, int, Any]]:
    shape = (STEPS, LAYERS, W)
    return [(*place, IDS[place[0], place[1], 2 * place[2] : 2 * place[2] + 2]) for place in np.ndindex(shape)]


def table(folder: Path) -> list[str]:
    lines = [",".join(map(str, (step, layer, rank, *row))) for step, layer, rank, ids in entries() for row in ids]
    (folder / "ids.csv").write_text("\n".join(["step,layer,rank,e0,e1,e2,e3", *lines]))
    return [str(folder / "ids.csv")]


def lines(folder: Path) -> list[str]:
    parts = [
        {"step": step, "layer": layer, "rank": rank, "ids": ids.tolist()}
        | {"weights": WEIGHTS[step, layer, 2 * rank : 2 * rank + 2].tolist()}
        for step, layer, rank, ids in entries()
    ]
    (folder / "ids.jsonl").write_text("\n".join(map(json.dumps, parts)))
    return [str(folder / "ids.jsonl")]


def megatron(folder: Path) -> list[str]:
    """Files as `RouterTracer` of Megatron-LM writes them: one a rank, a record a layer, all fields of a record."""
    for step, layer, rank, ids in entries():
        place = {"step": step, "stage": "pre_dispatch", "block": "decoder", "layer": layer, "rank": rank}
        record = place | {"num_tokens": 2, "topk": K, "top_indices": ids.tolist()}
        with (folder / f"router_trace_rank{rank}.jsonl").open("a") as stream:
            stream.write(json.dumps(record) + "\n")
    return [str(folder / f"router_trace_rank{rank}.jsonl") for rank in range(W)]


def response(ids: Any) -> str:
    """A response of vLLM's server: `numpy2base64` of experts [tokens, layers, k], layer 0 without experts."""
    buffer = io.BytesIO()
    np.save(buffer, np.concatenate([np.zeros_like(ids[:1]), ids]).transpose(1, 0, 2).astype(np.uint8))
    encoded = base64.b64encode(buffer.getvalue()).decode()
    choice = {"index": 0, "text": " a", "finish_reason": "length", "routed_experts": encoded}
    return json.dumps({"id": "cmpl-1", "object": "text_completion", "choices": [choice], "usage": {}})


def vllm(folder: Path) -> list[str]:
    (folder / "responses.jsonl").write_text("\n".join(response(IDS[step]) for step in range(STEPS)))
    return [str(folder / "responses.jsonl")]


TWO_LAYOUTS = json.dumps(
    {"choices": [json.loads(response(ids))["choices"][0] for ids in (IDS[0], IDS[0, :1])]}
).encode()


@pytest.mark.parametrize("write", [sglang, arrays, tensors, table, lines, megatron, vllm])
def test_every_format_gives_the_same_experts(tmp_path: Path, write: Any) -> None:
    _, slices = convert(write(tmp_path), E, W)
    first = 1 if write in (sglang, vllm) else 0  # a dense layer is in front
    assert sorted(slices) == [(step, layer + first) for step in range(STEPS) for layer in range(LAYERS)]
    for (step, layer), one in slices.items():
        assert one.ids.tolist() == IDS[step, layer - first].tolist()
        assert one.tokens.tolist() == [2] * W
        assert (one.weights is not None) == (write in (tensors, lines))
        assert one.weights is None or one.weights.tolist() == WEIGHTS[step, layer - first].tolist()


def test_command_converts_and_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "traffic.safetensors")
    command = ["trace", "convert", *sglang(tmp_path), f"--out={out}", "--ep-size=4", "--num-experts=16"]
    assert main(command) == 0
    told = capsys.readouterr().out
    assert f"{out}: 16 experts, top-4, 4 ranks; 2 steps, 3 layers (1 to 3)" in told
    header = read_header(out)
    most = max(int(read_slice(header, 0, layer).received(E).max()) for layer in header.steps[0])
    assert main(["trace", "info", out]) == 0
    assert any(line.split()[:4] == ["0", "8", "2", str(most)] for line in capsys.readouterr().out.splitlines())


def test_files_may_stand_behind_options_and_synth_reads_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"--out={tmp_path / 'a.safetensors'}", "--ep-size=4", "--num-experts=16"]
    assert main(["trace", "convert", *options, *sglang(tmp_path)]) == 0
    assert main(["trace", *options[:2], "convert", *options[2:], *sglang(tmp_path)]) == 0
    capsys.readouterr()
    assert main(["trace", "convert", *options, "--topkk=2", *sglang(tmp_path)]) == 2
    assert "--topkk=2 " in capsys.readouterr().err
    assert main(["trace", "synth", *options, "a.npy"]) == 2
    assert "'a.npy': it reads no file" in capsys.readouterr().err


def test_advice_counts_and_names_the_recorded_steps_above_a_limit(tmp_path: Path) -> None:
    out, advice = str(tmp_path / "a.safetensors"), tmp_path / "advice.json"
    assert main(["trace", "convert", *lines(tmp_path), f"--out={out}", "--ep-size=4", "--num-experts=16"]) == 0
    header = read_header(out)
    rows = {
        step: max(int(read_slice(header, step, layer).received(E).max()) for layer in layers)
        for step, layers in header.steps.items()
    }
    for limit in range(min(rows.values()) - 1, max(rows.values()) + 1):
        layer = ["--model=tiny", "--ep-size=4", f"--routing=trace:{out}", "--max-dispatch-tokens-per-rank=8"]
        assert main(["advise", "-q", *layer, f"--limit={limit}", f"--json={advice}"]) == 0
        found = json.loads(advice.read_text())
        yours = next(one for one in found["candidates"] if "yours" in one["reasons"])
        assert yours["first_steps_above"] == [step for step, most in rows.items() if most > limit]
        assert found["recorded"]


def test_recorded_tokens_keep_a_row_on_their_own_rank_where_a_shared_expert_has_a_slot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, advice = str(tmp_path / "a.safetensors"), tmp_path / "advice.json"
    path = tmp_path / "ids.jsonl"
    parts = ((0, [[0, 1, 2, 3]]), (1, [[0, 1, 2, 3], [8, 9, 10, 11], [12, 13, 14, 15]]))
    path.write_text("\n".join(json.dumps({"step": 0, "layer": 0, "rank": rank, "ids": ids}) for rank, ids in parts))
    assert main(["trace", "convert", str(path), f"--out={out}", "--ep-size=4", "--num-experts=16"]) == 0
    layer = ["--model=tiny", "--ep-size=4", f"--routing=trace:{out}", "--max-dispatch-tokens-per-rank=8"]
    for shared, rows in ((0, [2, 0, 1, 1]), (1, [2, 3, 1, 1])):
        assert read_slice(read_header(out), 0, 0).received(E, own=shared > 0).tolist() == rows
        assert main(["advise", "-q", *layer, f"--shared-experts={shared}", f"--json={advice}"]) == 0
        assert json.loads(advice.read_text())["seen"]["most"] == max(rows)
    (tmp_path / "placement.json").write_text(json.dumps([*range(1, 16), 0]))
    for slots in ("--physical-experts=32", f"--placement={tmp_path / 'placement.json'}"):
        assert main(["advise", *layer, slots]) == 2
        told = "its experts are slots here; give --num-experts as many, and no --physical-experts or --placement"
        assert told in capsys.readouterr().err


def test_synthetic_trace_has_the_experts_that_run_routes(tmp_path: Path) -> None:
    out = str(tmp_path / "a.safetensors")
    shape = ("--ep-size=4", "--num-experts=16", "--topk=4", "--tokens=3", "--steps=2", "--layers=2", "--seed=5")
    assert main(["trace", "synth", f"--out={out}", *shape, "--routing=zipf:1.2"]) == 0
    header = read_header(out)
    ranks, numbers = torch.arange(4).repeat_interleave(3), torch.arange(3).repeat(4)
    ids = route(parse_routing("zipf:1.2"), ExpertGroup(4, 16, 4), seed=6, ranks=ranks, tokens=numbers)
    assert read_slice(header, 0, 1).ids.tolist() == ids.tolist()
    assert (read_slice(header, 1, 1).ids != ids.numpy()).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["synth", "--out=a.safetensors", "--num-experts=9", "--ep-size=4"], "9 experts, top-8, on 4 ranks"),
        (["synth", "--out=a.safetensors", "--num-experts=16", "--routing=trace:a"], "is a recording"),
        (["synth", "--out=a.safetensors", "--num-experts=16", "--tokens=16777216"], "at most 268435456 in"),
        (["synth", "--out=a.safetensors", "--num-experts=16", "--routing=local"], "needs all topk"),
        (["synth", "--out=/dev/null/a.safetensors", "--num-experts=16"], "cannot be written"),
        (["convert", "--out=a.safetensors", "--num-experts=16"], "give the recordings"),
        (["info"], "give the trace"),
    ],
)
def test_trace_that_cannot_be_made_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["trace", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("together", [1, 3 * 24, 1 << 22])
def test_drawn_steps_are_those_of_their_seed_however_many_are_drawn_at_once(
    together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distbench.tools.recorded.synthetic._IDS_AT_ONCE", together * LAYERS)
    routing, group = parse_routing("zipf:1.2"), ExpertGroup(W, E, K)
    found = list(drawn(routing, group, (5, LAYERS, 2), 7))
    ranks = torch.arange(W).repeat_interleave(2)
    for place, ids in zip(np.ndindex(5, LAYERS), found, strict=True):
        tokens = torch.arange(2).repeat(W) + 2 * place[0]
        assert ids.tolist() == route(routing, group, seed=7 + place[1], ranks=ranks, tokens=tokens).tolist()


def test_tokens_shared_over_ranks_keep_their_order(tmp_path: Path) -> None:
    _, slices = convert(arrays(tmp_path), E, 3)
    assert slices[0, 0].tokens.tolist() == [3, 3, 2]
    assert slices[0, 0].ids.tolist() == IDS[0, 0].tolist()


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_rank_below_0_is_refused_and_not_taken_as_all(tmp_path: Path, name: str) -> None:
    csv = "step,layer,rank,e0,e1\n0,0,-1,1,2\n"
    content = csv if name.endswith("csv") else '{"step": 0, "layer": 0, "rank": -1, "ids": [[1, 2]]}\n'
    (tmp_path / name).write_text(content)
    with pytest.raises(InvalidCase, match="rank -1; allowed are whole numbers from 0 up"):
        list(read_parts(str(tmp_path / name)))


def test_lines_in_an_order_that_makes_too_many_runs_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distbench.tools.recorded.convert._MOST_ARRAYS", 2)
    lines = [f"0,{layer},0,1,2" for layer in (0, 1, 0)]
    (tmp_path / "a.csv").write_text("\n".join(["step,layer,rank,e0,e1", *lines]))
    with pytest.raises(InvalidCase, match="more than 2 runs of lines; sort them by step, layer and rank"):
        convert([str(tmp_path / "a.csv")], E, W)


class Evil:
    """Runs code where it is unpickled."""

    def __reduce__(self) -> Any:
        return (Path("/tmp/distbench-evil").touch, ())  # noqa: S108


def test_pickle_that_runs_code_is_never_loaded(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"records": [Evil()]}, path)
    with pytest.raises(InvalidCase, match="not a file of tensors and plain values alone"):
        list(read_parts(str(path)))
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(InvalidCase, match=r"tensors and plain values alone|cannot be read"):
        list(read_parts(str(path)))
    assert not Path("/tmp/distbench-evil").exists()  # noqa: S108


def recorded(ids: Any) -> dict[str, Any]:
    return {"records": [{"forward_pass_id": 0, "rank": 0, "topk_ids_of_layer": ids}]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "no records"),
        (recorded([[[1]]]), "a record without topk_ids_of_layer"),
        (recorded(torch.zeros(1).int().expand(1 << 10, 1 << 12, 1 << 10)), "a record of 4294967296 experts"),
        (recorded(torch.zeros(1, 1, 1)) | {"records": [{"topk_ids_of_layer": torch.zeros(1, 1, 1)}]}, "cannot be read"),
    ],
)
def test_recording_of_other_objects_or_of_one_repeated_number_is_refused(
    tmp_path: Path, content: Any, message: str
) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(InvalidCase, match=message):
        list(read_parts(str(tmp_path / "a.pt")))


def test_archive_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.pt"
    torch.save(recorded(torch.zeros(1, 1 << 16, 4, dtype=torch.int64)), tmp_path / "stored.pt")
    with zipfile.ZipFile(tmp_path / "stored.pt") as stored, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for one in stored.infolist():
            packed.writestr(one.filename, stored.read(one))
    monkeypatch.setattr("distbench.tools.recorded.readers._MOST_BYTES", 1 << 20)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(InvalidCase, match=r"unpacks to \d+ bytes, allowed are 1048576"):
        list(read_parts(str(path)))


def test_array_of_a_size_that_no_machine_has_and_archives_of_arrays_are_refused(tmp_path: Path) -> None:
    head = b"{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000, 8), }".ljust(117) + b"\n"
    path = tmp_path / "a.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head)
    with pytest.raises(InvalidCase, match="cannot be read"):
        list(read_parts(str(path)))
    with path.open("wb") as file:
        np.savez(file, ids=IDS)
    with pytest.raises(InvalidCase, match="an archive of arrays"):
        list(read_parts(str(path)))


def test_layers_of_multi_token_prediction_are_apart_from_the_decoders(tmp_path: Path) -> None:
    place = {"step": 0, "layer": 1, "rank": 0, "top_indices": [[1]]}
    lines = [place | {"block": "decoder"}, place | {"block": "mtp", "mtp_idx": 2}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [part.layer for part in read_parts(str(tmp_path / "a.jsonl"))] == [1, 1_002_001]


def test_rank_without_tokens_may_have_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"step": 0, "layer": 0, "rank": 0, "ids": [[1]]}\n{"step": 0, "layer": 0, "rank": 1, "ids": []}\n')
    _, slices = convert([str(path)], E, W)
    assert slices[0, 0].tokens.tolist() == [1, 0, 0, 0]


def test_advice_opens_a_recording_a_few_times_whatever_its_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    first = safetensors.safe_open

    def noted(path: str, **how: Any) -> Any:
        opened.append(path)
        return first(path, **how)

    monkeypatch.setattr(safetensors, "safe_open", noted)
    out = str(tmp_path / "a.safetensors")
    assert main(["trace", "synth", f"--out={out}", "--ep-size=4", "--num-experts=16", "--topk=4", "--steps=40"]) == 0
    group = ("--model=tiny", "--ep-size=4", "--max-dispatch-tokens-per-rank=16")
    advise = ["advise", "-q", *group, f"--routing=trace:{out}"]
    assert main(advise) == 0
    assert 0 < len(opened) < 12
    monkeypatch.setattr("distbench.tools.advise.recording._MOST_COUNTS", 8)
    assert main(advise) == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.bin", b"", "known are .pt, .npy, .safetensors, .csv, .jsonl"),
        ("a.npy", b"\x93NUMPY", "cannot be read"),
        ("a.safetensors", b"\xff" * 64, "cannot be read"),
        ("a.csv", b"step,layer,rank\n0,0,0\n", "no column of experts"),
        ("a.csv", b"step,layer,e0\n", "no column rank"),
        ("a.csv", b"step,layer,rank,e0\n0,0,0,16\n", r"experts \[16\]: experts are 0 to 15"),
        ("a.csv", b"step,layer,rank,e0,e1\n0,0,0,3,3\n", "an expert twice"),
        ("a.csv", b"step,layer,rank,e0,e1\n0,0,0,3,-1\n0,0,0,3,4\n", "experts are 0 to 15"),
        ("a.csv", b"step,layer,rank,e0\n0,0,4,1\n", "rank 4 of 4 ranks; give --ep-size"),
        ("a.csv", b"step,layer,rank,e0\n-1,0,0,1\n", "step -1, layer 0"),
        ("a.csv", b"step,layer,rank,e0\n0,0,0\n", "line 2: 3 columns, the first line has 4"),
        ("a.csv", b"step,layer,rank,e0\n0,0,0,1,2\n", "line 2: 5 columns, the first line has 4"),
        ("a.pt", b"", "cannot be read .it ends too early"),
        ("a.csv", b"step,layer,rank,e0\n", "no token in it"),
        ("a.csv", b"step,layer,rank,e0\n0,0,0,1\n0,1,1,1\n", "layer 1 has .* tokens of the ranks, another"),
        ("a.jsonl", b"{}", "cannot be read .no 'ids'"),
        ("a.jsonl", b'{"step": 0, "layer": 0, "rank": 0, "ids": [[1], [1, 2]]}', "cannot be read"),
        ("a.jsonl", b'{"step": 0, "layer": 0, "rank": 0, "ids": [1]}', "give a list of the experts of each token"),
        ("a.csv", b"step,layer,rank,e0,e1\n0,0,0,3,-1\n", "experts are 0 to 15"),
        ("a.jsonl", b'{"choices": [{"text": "a"}]}', "start vLLM with --enable-return-routed-experts"),
        ("a.jsonl", b'{"choices": [{"routed_experts": "?"}]}', "cannot be read"),
        ("a.jsonl", b'{"choices": [{"routed_experts": "gASVBgAAAAAAAABLAS4="}]}', "pickled objects"),
        ("a.jsonl", b'{"choices": 1}', "cannot be read"),
        ("a.jsonl", TWO_LAYOUTS, "its choices have other layers or top-k"),
        ("a.jsonl", b'{"step": 0, "layer": 0, "rank": 0, "block": "mtp", "top_indices": [[1]]}', "no 'mtp_idx'"),
        ("a.jsonl", HALF_WEIGHED, "some tokens have weights, others have none"),
        ("a.jsonl", HALF_WEIGHED.replace(b"[[1.0]]", b"[[1.0, 2.0]]"), "give one for each"),
        ("a.jsonl", HALF_WEIGHED.splitlines()[0].replace(b"1.0", b"-1.0"), "not below 0"),
        ("a.jsonl", HALF_WEIGHED.splitlines()[0].replace(b"1.0", b"1e300"), "allowed are finite ones"),
        ("a.jsonl", TWO_KINDS, "top-2, elsewhere top-1"),
    ],
)
def test_file_without_routed_tokens_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InvalidCase, match=message) as refused:
        convert([str(path)], E, W)
    assert "\n" not in str(refused.value)


def test_tokens_of_two_files_are_not_those_of_one_step(tmp_path: Path) -> None:
    first, *others = sglang(tmp_path)
    with pytest.raises(InvalidCase, match=f"{re.escape(first)}.*layer .: rank 0 is in an earlier file too; give each"):
        convert([first, *others, first], E, W)
    np.save(tmp_path / "a.npy", np.array([[0, 1]] * W))
    with pytest.raises(InvalidCase, match="number the steps of several files one after the other"):
        convert([str(tmp_path / "a.npy"), str(tmp_path / "a.npy")], E, W)
    convert([str(tmp_path / "a.npy")], E, W)


def test_recording_with_more_experts_than_allowed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distbench.tools.recorded.convert.MOST_IDS", 8)
    with pytest.raises(InvalidCase, match="more than 8 experts"):
        convert(arrays(tmp_path), E, W)
    monkeypatch.setattr("distbench.tools.recorded.readers._MOST_BYTES", 8)
    with pytest.raises(InvalidCase, match="more than 0 GiB"):
        convert(arrays(tmp_path), E, W)


@pytest.mark.parametrize("arguments", [["--out=a.json", "--num-experts=16"], ["--out=a.safetensors"], []])
def test_conversion_without_its_options_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "convert", "a.npy", *arguments]) == 2
    assert "give --out FILE.safetensors and --num-experts N" in capsys.readouterr().err
