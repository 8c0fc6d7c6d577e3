"""The proof of sensitivity: any fault changes bits, in the tokens that it touches only."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from distbench.workload.batch import TokenBatch
from distbench.workload.places import places_of
from distbench.workload.quantize import dequantize
from tests.unit.workload.kernels import Kernel, layer_of, run
from tests.unit.workload.shapes import SHAPES, changed_rows, plan_of_workload, workload_of


@pytest.mark.parametrize("name", SHAPES)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_wrong_missing_or_reweighted_route_changes_only_its_token(name: str, data: st.DataObject) -> None:
    workload = workload_of(name, data.draw(st.integers(0, 2**62)))
    batch = workload.tokens(0)
    token = data.draw(st.integers(0, 5))
    slot = data.draw(st.integers(0, batch.ids.shape[1] - 1))
    unused = sorted(set(range(-1, workload.group.num_experts)) - set(batch.ids[token].tolist()))
    ids, weights = batch.ids.clone(), batch.weights.clone()
    if data.draw(st.booleans()):
        ids[token, slot] = data.draw(st.sampled_from(unused))
    else:
        weights[token, slot] = data.draw(st.sampled_from([0.0, 1.5 - float(weights[token, slot])]))
    before, after = workload.expected(batch), workload.expected(batch._replace(ids=ids, weights=weights))
    assert changed_rows(before, after) == [token]


@pytest.mark.parametrize("name", SHAPES)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_doubling_any_route_changes_its_token(name: str, data: st.DataObject) -> None:
    workload = workload_of(name, data.draw(st.integers(0, 2**62)))
    batch = workload.tokens(0)
    for slot in range(batch.ids.shape[1]):
        alone = workload.expected(
            batch._replace(ids=batch.ids[:, slot : slot + 1], weights=batch.weights[:, slot : slot + 1])
        )
        assert alone is not None
        assert bool(alone.any(1).all())


@pytest.mark.parametrize("name", SHAPES)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**62))
def test_swapping_two_tokens_changes_both(name: str, seed: int) -> None:
    workload = workload_of(name, seed)
    batch = workload.tokens(0)
    swapped = torch.tensor([1, 0, 2, 3, 5, 4])
    moved = batch._replace(
        hidden=batch.hidden.view(torch.uint8)[swapped].view(batch.hidden.dtype),
        scales=None if batch.scales is None else batch.scales[swapped],
    )
    before = workload.expected(batch)
    assert changed_rows(before, workload.expected(moved)) == [0, 1, 4, 5]
    mine = [dict(zip(*pair, strict=True)) for pair in zip(batch.ids.tolist(), batch.weights.tolist(), strict=True)]
    for other in (
        batch._replace(ids=batch.ids[swapped]),
        batch._replace(weights=batch.weights[swapped]),
        batch._replace(ids=batch.ids[swapped], weights=batch.weights[swapped]),
    ):
        theirs = [
            dict(zip(*pair, strict=True)) for pair in zip(other.ids.tolist(), other.weights.tolist(), strict=True)
        ]
        wanted = [token for token in range(6) if mine[token] != theirs[token]]
        assert changed_rows(before, workload.expected(other)) == wanted


@pytest.mark.parametrize("name", ["tiny", "tiny-odd", "tiny fp8", "tiny fnuz", "qwen3-30b-a3b/8"])
def test_every_hidden_column_affects_some_token(name: str) -> None:
    """One column of one token changes at a time; a wide column shows if a row that reads it is active."""
    workload = workload_of(name, tokens=40)
    plan, layer = plan_of_workload(workload), layer_of(workload, range(2))
    batch = workload.tokens(0)
    hidden, expected = dequantize(batch.hidden, batch.scales), workload.expected(batch)
    assert expected is not None
    wide = set(places_of(plan, hidden.device).wide.tolist())
    for column in range(hidden.shape[1]):
        damaged = hidden.clone()
        damaged[:, column] = hidden[:, column] * 2 if column in wide else torch.where(hidden[:, column] == 0, 1.0, 0.0)
        after = run(Kernel(), layer, TokenBatch(damaged, None, batch.weights, batch.ids))
        assert len(changed_rows(expected, after)) >= (1 if column in wide else 36), column


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**62))
def test_every_intermediate_row_affects_some_token(seed: int) -> None:
    """Excluded are the few probe rows whose expert is never active in their group, for lack of a code column."""
    workload = workload_of("tiny", seed, tokens=400)
    w1, w2 = (weights.float() for weights in workload.numerics.dense_weights(torch.arange(8)))
    hidden = workload.tokens(0).hidden.float()
    for expert in range(8):
        gate, up = (hidden @ w1[expert].t()).chunk(2, dim=1)
        effect = (functional.silu(gate) * up).any(0) & w2[expert].any(0)
        assert int((~effect).sum()) <= 16
        assert bool(effect[places_of(plan_of_workload(workload), hidden.device).sum_rows].all())
