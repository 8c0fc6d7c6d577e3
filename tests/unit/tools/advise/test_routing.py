"""Models of routing: synthetic kinds against the tokens that `run` routes, histograms, and drift."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distbench.errors import InvalidCase
from distbench.tools.advise.hits import round_robin
from distbench.tools.advise.routing import histogram_model, synthetic_model
from distbench.workload.routing import destinations, route
from distbench.workload.routing_spec import ExpertGroup, parse_routing

W, E, K = 4, 16, 3


@pytest.mark.parametrize("kind", ["uniform", "hot-rank:2", "fan-in:1", "local", "duplicates"])
def test_synthetic_model_has_the_shares_of_the_tokens_that_run_routes(kind: str) -> None:
    model = synthetic_model(parse_routing(kind), K, round_robin(E, E, W), 3, 0)
    tokens = torch.arange(20_000)
    ids = route(parse_routing(kind), ExpertGroup(W, E, K), seed=5, ranks=torch.full_like(tokens, 3), tokens=tokens)
    shares = destinations(ids, E // W, W).double().mean(0).tolist()
    groups = model.layers[0]
    told = groups.chances[groups.group] if not model.own else np.arange(W) == 3
    assert len(model.layers) == 3
    assert shares == pytest.approx(list(map(float, told)), abs=0.015)


def test_zipf_has_the_shares_of_run_and_another_order_in_each_layer() -> None:
    model = synthetic_model(parse_routing("zipf:1.2"), K, round_robin(E, E, E), 2, 0)
    first, second = (groups.chances[groups.group] for groups in model.layers)
    assert first.tolist() != second.tolist()
    assert sorted(first) == pytest.approx(sorted(second))
    tokens = torch.arange(40_000)
    ids = route(parse_routing("zipf:1.2"), ExpertGroup(E, E, K), seed=5, ranks=tokens * 0, tokens=tokens)
    shares = destinations(ids, 1, E).double().mean(0).sort().values.tolist()
    assert shares == pytest.approx(sorted(first), abs=0.01)


def test_kinds_that_name_a_rank_are_refused_with_replicas() -> None:
    with pytest.raises(InvalidCase, match="not defined with replicated experts"):
        synthetic_model(parse_routing("hot-rank:0"), K, round_robin(E, 2 * E, W), 1, 0)


def written(folder: Path, counts: Any) -> str:
    path = folder / "loads.json"
    path.write_text(json.dumps(counts))
    return str(path)


def test_histogram_gives_each_expert_its_share(tmp_path: Path) -> None:
    counts = np.array([9000, 5000, 3000, *[1000] * 13])
    model = histogram_model(written(tmp_path, counts.tolist()), K, round_robin(E, E, E), 5)
    groups = model.layers[0]
    assert len(model.layers) == 5
    assert groups.chances[groups.group] == pytest.approx(K * counts / counts.sum(), rel=1e-3)
    assert model.drift == ""


def test_histograms_of_layers_and_numpy_files_are_read(tmp_path: Path) -> None:
    path = str(tmp_path / "loads.npy")
    np.save(path, np.ones((7, E), dtype=np.int32))
    assert len(histogram_model(path, K, round_robin(E, E, W), 5).layers) == 7


def test_counts_of_sglangs_recorder_and_of_eplb_are_read_without_dense_layers(tmp_path: Path) -> None:
    counts = torch.ones(5, 3, E, dtype=torch.int32)
    counts[:, 0] = 0
    torch.save({"rank": 0, "logical_count": counts, "average_utilization_rate_over_window": None}, tmp_path / "a.pt")
    (tmp_path / "a.json").write_text(json.dumps({"logical_count": counts.tolist()}))
    for name in ("a.pt", "a.json"):
        assert len(histogram_model(str(tmp_path / name), K, round_robin(E, E, W), 1).layers) == 2


def test_drift_over_steps_is_said_and_draws_of_one_distribution_have_none(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    chosen = [np.bincount(rng.random((500, E)).argsort(axis=1)[:, :K].ravel(), minlength=E) for _ in range(50)]
    steady = np.array(chosen).reshape(50, 1, E)
    placement = round_robin(E, E, W)
    assert histogram_model(written(tmp_path, steady.tolist()), K, placement, 1).drift == ""
    moving = np.concatenate([steady, steady + 10 * np.arange(50)[:, None, None] * (np.arange(E) == 3)], axis=1)
    found = histogram_model(written(tmp_path, moving.tolist()), K, placement, 1)
    assert found.drift.startswith("the loads of layer 1 drift over the steps")


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([1] * 15, "loads of 15 experts, the model has 16"),
        ([-1] * 16, "below 0"),
        ([0] * 16, "all 0"),
        ([[[[1] * 16]]], "allowed are numbers"),
        ([], "allowed are numbers"),
        (["x"] * 16, "cannot be read"),
        ([[1], [1, 2]], "cannot be read"),
        ({"a": 1}, "cannot be read"),
    ],
)
def test_histogram_that_is_none_is_refused(tmp_path: Path, counts: Any, message: str) -> None:
    with pytest.raises(InvalidCase, match=message) as refused:
        histogram_model(written(tmp_path, counts), K, round_robin(E, E, W), 1)
    assert "\n" not in str(refused.value)


def test_archive_of_arrays_and_a_tensor_that_repeats_one_number_are_refused(tmp_path: Path) -> None:
    with (tmp_path / "loads.npy").open("wb") as file:
        np.savez(file, loads=np.ones(E))
    torch.save({"logical_count": torch.ones(1).expand(1 << 20, 1 << 12, E)}, tmp_path / "loads.pt")
    for name, message in (("loads.npy", "an archive of arrays"), ("loads.pt", r"\d+ loads, allowed are 33554432")):
        with pytest.raises(InvalidCase, match=message):
            histogram_model(str(tmp_path / name), K, round_robin(E, E, W), 1)


def test_pickle_in_a_numpy_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "loads.npy"
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InvalidCase, match="cannot be read"):
        histogram_model(str(path), K, round_robin(E, E, W), 1)
