"""Recorded routing as a file: written, read, routed, and refused where it is none."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from distbench.case.resolve import Layer, resolve_case
from distbench.case.trace_name import TraceName, trace_name
from distbench.errors import InvalidCase
from distbench.launcher.preflight import check_case
from distbench.pipeline.inputs import workload_for
from distbench.workload.routing import recv_counts, route
from distbench.workload.routing_spec import ExpertGroup, Routing, check_routing, parse_routing
from distbench.workload.trace_file import Header, Slice, read_header, read_slice, trace_bytes
from tests.cases import tiny_case

E, K, W = 16, 4, 4
COUNTS = (2, 0, 5, 3)
METADATA = {"format": "distbench-trace", "version": "1", "num_experts": "16", "topk": "4", "ep_size": "4"}


def experts(tokens: int, seed: int) -> Any:
    return np.random.default_rng(seed).random((tokens, E)).argsort(axis=1)[:, :K].astype(np.int32)


@pytest.fixture
def path(tmp_path: Path) -> str:
    named = str(tmp_path / "a.safetensors")
    tokens = np.array(COUNTS, dtype=np.int64)
    slices = {(step, layer): Slice(experts(10, step + layer), tokens) for step, layer in ((7, 3), (7, 4), (9, 3))}
    Path(named).write_bytes(trace_bytes(Header("", E, K, W, "here", {}), slices))
    return named


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("trace:a/b.safetensors", TraceName("a/b.safetensors")),
        (" trace:a@1.2@7.3", TraceName("a@1.2", 7, 3)),
        ("trace:a@7", TraceName("a@7")),
        ("trace:", None),
        ("uniform", None),
    ],
)
def test_name_has_a_path_and_may_have_a_step_and_layer(text: str, name: TraceName | None) -> None:
    assert trace_name(text) == name
    assert name is None or trace_name(str(name)) == name
    assert name is None or str(parse_routing(text)) == text.strip()


def test_file_has_its_steps_and_layers_in_order(path: str) -> None:
    header = read_header(path)
    assert header == Header(path, E, K, W, "here", {7: [3, 4], 9: [3]})
    one = read_slice(header, 7, 4)
    assert (one.ids == experts(10, 11)).all()
    assert one.tokens.tolist() == list(COUNTS)
    rows = recv_counts(torch.from_numpy(one.ids), E // W, W)
    assert one.received(E).tolist() == rows.tolist()


def test_ranks_route_the_recorded_experts(path: str) -> None:
    for text, seed in ((f"trace:{path}", 10), (f"trace:{path}@9.3", 12)):
        ranks = torch.repeat_interleave(torch.arange(W), torch.tensor(COUNTS))
        tokens = torch.cat([torch.arange(count) for count in COUNTS])
        shuffled = torch.randperm(10)
        ids = route(parse_routing(text), ExpertGroup(W, E, K), seed=0, ranks=ranks[shuffled], tokens=tokens[shuffled])
        assert ids.tolist() == experts(10, seed)[shuffled.numpy()].tolist()


def test_case_carries_the_digest_of_its_recording_and_other_cases_none(path: str) -> None:
    def case(**values: Any) -> Any:
        return resolve_case([Layer("test", {"model": "tiny", **values})], W).case

    recorded = case(routing=f"trace:{path}", tokens=list(COUNTS))
    check_case(recorded)
    assert len(recorded.routing_sha256) == 64
    assert case().routing_sha256 == ""
    with pytest.raises(InvalidCase, match=r"rank 1 has 1, the recording 0; give --tokens 2,0,5,3, or fewer"):
        check_case(case(routing=f"trace:{path}", tokens=[2, 1, 5, 3]))
    with pytest.raises(InvalidCase, match=r"routing = trace:'none': cannot be read"):
        case(routing="trace:none")


def test_recording_of_another_layer_is_refused(path: str) -> None:
    routing = parse_routing(f"trace:{path}")
    with pytest.raises(InvalidCase, match=r"recorded with num_experts = 16, not 32, topk = 4, not 8; give the layer"):
        check_routing(routing, ExpertGroup(W, 32, 8))
    with pytest.raises(InvalidCase, match="no step 8 with layer 3; the first is 7 with 3"):
        check_routing(Routing("trace", trace=TraceName(path, 8, 3)), ExpertGroup(W, E, K))


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ({}, {}, "not a recorded routing of distbench; `distbench trace convert` makes one"),
        (METADATA | {"version": "2"}, {}, "version '2' of the format"),
        (METADATA | {"topk": "-4"}, {}, "topk = '-4' in its metadata"),
        (METADATA | {"topk": "9" * 5000}, {}, "topk = "),
        (METADATA, {"tokens.0": np.ones(4, np.int64)}, "no step in it"),
        (METADATA, {"ids.0.0": np.zeros((4, 4), np.int32)}, "step 0, layer 0"),
        (METADATA, {"ids.0.0": np.zeros((4, 4), np.int64), "tokens.0": np.ones(4, np.int64)}, "not of the format"),
        (METADATA, {"ids.0.0": np.zeros((3, 4), np.int32), "tokens.0": np.ones(4, np.int64)}, r"ids \(3, 4\)"),
        (METADATA, {"ids.0.0": np.zeros((4, 4), np.int32), "tokens.0": np.ones(4, np.int64)}, "an expert twice"),
        (METADATA, {"ids.0.0": experts(4, 0) - 1, "tokens.0": np.ones(4, np.int64)}, "experts are 0 to 15"),
        (METADATA, {"ids.0.0": experts(4, 0), "tokens.0": np.array([5, -1, 0, 0])}, "ids"),
        (METADATA, {"ids.0.0": np.zeros((0, 4), np.int32), "tokens.0": np.full(4, 1 << 62)}, "ids"),
        (METADATA, {f"ids.{'1' * 5000}.0": experts(4, 0), "ids.0.0.0": experts(4, 0)}, "no step in it"),
    ],
)
def test_file_that_is_no_trace_is_refused(tmp_path: Path, metadata: Any, tensors: Any, message: str) -> None:
    path = str(tmp_path / "a.safetensors")
    save_file({"other": np.zeros(1), **tensors}, path, metadata)
    with pytest.raises(InvalidCase, match=message):
        read_slice(read_header(path), 0, 0)


def test_path_that_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (str(tmp_path / "pipe"), str(tmp_path), "a" * 5000, "a\0b"):
        with pytest.raises(InvalidCase, match="cannot be read"):
            read_header(path)


def test_rows_of_more_ranks_than_experts_are_counted_without_a_warning() -> None:
    assert Slice(np.array([[0, 1]], np.int32), np.array([1, 0, 0])).received(2).tolist() == [1, 1, 0]


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\xff\xff\xff\x00\x00\x00\x00\x00{}", b"junk" * 99])
def test_file_that_is_no_safetensors_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(InvalidCase, match="cannot be read") as refused:
        read_header(str(path))
    assert "\n" not in str(refused.value)


def shares(tokens: int, factor: float = 1.0) -> Any:
    drawn = np.random.default_rng(5).random((tokens, K)) + 0.1
    return (factor * drawn / drawn.sum(axis=1, keepdims=True)).astype(np.float32)


def weighed(path: Path, weights: Any) -> str:
    slices = {(0, 0): Slice(experts(10, 1), np.array(COUNTS, dtype=np.int64), weights)}
    path.write_bytes(trace_bytes(Header("", E, K, W, "here", {}), slices))
    return str(path)


@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_recorded_weights_are_those_of_gaussian_inputs_and_order_those_of_exact_ones(
    tmp_path: Path, factor: float
) -> None:
    weights = shares(10, factor)
    weights[3] = 0  # of padding
    name = weighed(tmp_path / "a.safetensors", weights)
    assert read_header(name).weighed
    keys = {"tokens": COUNTS, "routing": f"trace:{name}"}
    layer = {"model": "custom", "hidden_size": 256, "intermediate_size": 128, "num_experts": E, "topk": K}
    values: dict[str, Any] = layer | keys
    first = 0
    for rank, count in enumerate(COUNTS):
        here = torch.from_numpy(weights[first : first + count])
        for numerics in ("exact", "gaussian"):
            case = tiny_case(W, **values, numerics=numerics)
            batch = workload_for(case, torch.device("cpu")).tokens(rank)
            if numerics == "gaussian":
                assert torch.equal(batch.weights, here)
            else:
                assert set(batch.weights.flatten().tolist()) <= {0.5, 1.0}
                for told, made in zip(here.tolist(), batch.weights.tolist(), strict=True):
                    ordered = [one for _, one in sorted(zip(told, made, strict=True))]
                    assert ordered == sorted(made)
        first += count


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ([np.nan, 0.1, 0.4, 0.5], "token 2 has weights"),
        ([np.inf, 0.1, 0.4, 0.5], "allowed are finite ones"),
        ([-0.1, 0.6, 0.4, 0.1], "not below 0"),
        ([0.1, 0.1, 0.1, 0.1], "the weights of token 2 sum to 0.4, others to 1"),
    ],
)
def test_weights_that_no_router_makes_are_refused(tmp_path: Path, change: list[float], reason: str) -> None:
    weights = shares(10)
    weights[2] = change
    name = weighed(tmp_path / "a.safetensors", weights)
    with pytest.raises(InvalidCase, match=reason):
        read_slice(read_header(name), 0, 0)


@pytest.mark.parametrize("factor", [0, 1e-40, 1e-5, 1e5, 1e37])
def test_weights_that_leave_no_output_to_compare_are_refused(tmp_path: Path, factor: float) -> None:
    name = weighed(tmp_path / "a.safetensors", shares(10) * np.float32(factor))
    with pytest.raises(InvalidCase, match=r"sum to at most .*allowed are 1 / 1024 to 1024"):
        read_slice(read_header(name), 0, 0)


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    name = weighed(tmp_path / "a.safetensors", shares(10))
    tensors = load_file(name)
    tensors["weights.0.0"] = tensors["weights.0.0"][:9].copy()
    save_file(tensors, name, METADATA)
    with pytest.raises(InvalidCase, match=r"weights float32 \(9, 4\), float32 \(10, 4\) are of the format"):
        read_slice(read_header(name), 0, 0)
