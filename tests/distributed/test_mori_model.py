"""The stand-in for MoRI against its documented semantics, bit for bit, with sums that depend on their order."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from distbench.case.spec import Case
from distbench.distributed.session import Session
from distbench.transport.mori.emulated.codec import Fp4Blockwise
from distbench.transport.mori.transport import MoriTransport
from distbench.verify.row_compare import same_bits
from distbench.workload.batch import TokenBatch
from tests.cases import tiny_case
from tests.distributed import mori_model as model
from tests.ranks import on_ranks

HIDDEN, TOPK, MOST = 64, 6, 16
FP8 = {304: torch.float8_e4m3fnuz, 256: torch.float8_e4m3fn}
# Sums of these values depend on the order of additions, and on roundings between them.
VALUES = (1e8, 1.0, -1e8, -0.0, 0.0, 1.0078125, -3.0, 2.0**-9, 255.0, 1.5e38, 257.0, -500.0, 300.0, -241.0, 0.01)
SKIPPING = ("IntraNode", "IntraNodeLL", "InterNodeV1")
Ids = list[list[list[int]]]
LAYOUTS = [
    (kernel, ranks, nodes)
    for ranks in (2, 4, 8)
    for kernel in ("IntraNode", "IntraNodeLL", "InterNodeV1", "InterNodeV1LL", "AsyncLL")
    for nodes in (1, 2)
    if nodes == 1 or not kernel.startswith("IntraNode")
]


def layout_case(kernel: str, ranks: int, nodes: int, **values: Any) -> Case:
    shape: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "topk": TOPK,
        "num_experts": 4 * ranks,
        "max_dispatch_tokens_per_rank": MOST,
    }
    return tiny_case(
        ranks, transport="mori", emulate=True, mori_kernel=kernel, gpu_per_node=ranks // nodes, **shape, **values
    )


def ids_of(case: Case, chance: random.Random) -> Ids:
    """Ids by rank and token: every kind of top-k entry, and a rank without tokens."""
    experts, local = case.num_experts, case.experts_per_rank
    special = [[0, local, 1, 2, local + 1, 3], [0] * TOPK, [experts - 1, 0, experts - 2, 1, experts - 3, 2]]
    if case.mori_kernel in SKIPPING:
        special += [[-1, 0, local, -1, 1, -1], [-1] * TOPK]
    ids = [
        [*special, *([chance.randrange(experts) for _ in range(TOPK)] for _ in range(4 + chance.randrange(8)))]
        for _ in range(case.ep_size)
    ]
    ids[case.ep_size - 1] = []
    return ids


def value_of(seed: int, rank: int, source: int, token: int) -> list[float]:
    """Expert row of a token on `rank`: HIDDEN numbers, each a bf16 value."""
    chance = random.Random(f"{seed}/{rank}/{source}/{token}")
    return [model.bf16(chance.choice(VALUES)) for _ in range(HIDDEN)]


def rounds(session: Session, case: Case, ids: Ids, seed: int) -> list[tuple[list[tuple[int, int]], torch.Tensor]]:
    """Dispatch and combine twice; return the received rows by rank and the combined tokens."""
    session.enter(case.ep_size)
    transport = MoriTransport(session, case)
    mine = torch.tensor(ids[session.rank], dtype=torch.int32).view(-1, TOPK)
    hidden = torch.full((len(mine), HIDDEN), float(session.rank)).bfloat16()
    weights = torch.arange(mine.numel(), dtype=torch.float32).view(-1, TOPK)
    found = []
    for _ in range(2):
        given = transport.dispatch(TokenBatch(hidden, None, weights, mine))
        sources = [(int(rank), int(token)) for rank, token in transport.sources()]
        for slot, (rank, token) in enumerate(sources):
            assert given.ids[slot].tolist() == ids[rank][token]
            assert given.weights[slot].tolist() == list(range(token * TOPK, (token + 1) * TOPK))
            assert set(given.hidden[slot].tolist()) == {float(rank)}
        assert int(given.total_recv) == len(sources)
        rows = [value_of(seed, session.rank, *source) for source in sources]
        found.append((sources, transport.combine(model.rows_of(rows).view(-1, HIDDEN), mine)))
        assert int(given.total_recv) == len(sources)
    transport.close()
    return found


@pytest.mark.parametrize(("kernel", "ranks", "nodes"), LAYOUTS)
def test_stand_in_equals_the_model_of_mori(kernel: str, ranks: int, nodes: int) -> None:
    check(layout_case(kernel, ranks, nodes), seed=ranks)


@pytest.mark.parametrize("kernel", ["IntraNode", "IntraNodeLL"])
def test_registered_combine_buffer_gives_the_same_bits(kernel: str) -> None:
    check(layout_case(kernel, 4, 1, combine_input="registered"), seed=9)


@pytest.mark.parametrize(
    ("kernel", "nodes", "quant"),
    [
        ("IntraNode", 1, "fp8_direct_cast"),
        ("AsyncLL", 2, "fp8_direct_cast"),
        ("InterNodeV1", 1, "fp8_direct_cast"),
        ("InterNodeV1LL", 2, "fp8_direct_cast"),
        ("IntraNode", 1, "fp8_blockwise"),
        ("IntraNodeLL", 1, "fp8_blockwise"),
        ("AsyncLL", 2, "fp8_blockwise"),
        ("IntraNode", 1, "fp4_blockwise"),
        ("IntraNodeLL", 1, "fp4_blockwise"),
    ],
)
@pytest.mark.parametrize("cu_count", [304, 256])
def test_quantised_combine_equals_the_model_of_mori(kernel: str, nodes: int, quant: str, cu_count: int) -> None:
    check(layout_case(kernel, 4, nodes, combine_quant=quant, numerics="gaussian", cu_count=cu_count), seed=3)


def test_model_vectors_distinguish_the_fp8_formats() -> None:
    for quant in ("fp8_direct_cast", "fp8_blockwise"):
        found = [
            model.combined(model.Layout("IntraNode", 4, 4, 4, fp8), [0, 4], lambda rank: [300.0 + rank], quant)
            for fp8 in FP8.values()
        ]
        assert found == ([[480.0], [576.0]] if quant == "fp8_direct_cast" else [[600.0], [576.0]])


def test_fp4_values_round_to_even() -> None:
    values = [eighths / 8 for eighths in range(-48, 49)]
    rows = torch.tensor([[6.0, value] for value in values]).bfloat16()
    codec = Fp4Blockwise(rows.shape[1])
    codec.blocks, codec._block = 1, 2
    found = codec.add(torch.zeros(rows.shape), codec.pack(rows))
    assert found[:, 1].tolist() == [model.e2m1(value) for value in values]


def check(case: Case, seed: int) -> None:
    layout = model.Layout(case.mori_kernel, case.ep_size, case.experts_per_rank, case.gpu_per_node, FP8[case.cu_count])
    ids = ids_of(case, random.Random(seed))

    def expected(rank: int, token: int) -> list[float]:
        def row(peer: int) -> list[float]:
            return value_of(seed, peer, rank, token)

        return model.combined(layout, ids[rank][token], row, case.combine_quant) or [0.0] * HIDDEN

    everyones = on_ranks(case.ep_size, rounds, case, ids, seed)
    for rank, twice in enumerate(everyones):
        wanted = model.rows_of([expected(rank, token) for token in range(len(ids[rank]))]).view(-1, HIDDEN)
        for sources, tokens in twice:
            assert sorted(sources) == model.received(layout, ids, rank)
            assert same_bits(tokens, wanted)
    orders = [sources for twice in everyones for sources, _ in twice if len(sources) > 5]
    assert any(order != sorted(order) for order in orders)
    if case.mori_kernel == "AsyncLL":
        assert all([rank for rank, _ in order] == sorted(rank for rank, _ in order) for order in orders)


@pytest.mark.parametrize(
    ("rows", "intra", "last", "two_levels"),
    [((1e8, -1e8, 1.0, 0.5), 1.5, 0.5, 1.5), ((256.0, 1.0, 0.0, 1.0), 258.0, 258.0, 256.0)],
)
def test_model_vectors_distinguish_the_kernels(
    rows: tuple[float, ...], intra: float, last: float, two_levels: float
) -> None:
    ids = [0, 4, 1, 8, 2, 12]

    def result(kernel: str, per_node: int) -> float:
        layout = model.Layout(kernel, 4, 4, per_node)
        return model.combined(layout, ids, lambda rank: [model.bf16(rows[rank])], "none")[0]

    assert result("IntraNode", 4) == intra
    assert result("IntraNodeLL", 4) == last
    assert result("InterNodeV1", 2) == two_levels
