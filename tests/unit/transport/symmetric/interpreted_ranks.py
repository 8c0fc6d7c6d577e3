"""Dispatch and combine of ranks that map each other's memory, by Triton's interpreter, as one JSON object.

Run as a script, with TRITON_INTERPRET=1. A finding is true where a rule holds, or where a fault is noticed.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
from torch import Tensor

from distbench.case.resolve import Layer, resolve_case
from distbench.case.spec import Case
from distbench.distributed.session import Session
from distbench.errors import DistbenchError
from distbench.transport.base import Dispatched, TransportContext
from distbench.transport.symmetric.transport import SymmetricTransport
from distbench.workload.batch import TokenBatch
from distbench.workload.routing import destinations
from tests.ranks import on_ranks

RANKS, EXPERTS, TOPK = 3, 6, 3
TOKENS = (5, 0, 3)


def main() -> None:
    assert os.environ["TRITON_INTERPRET"] == "1"
    found: dict[str, bool] = {}
    for name, keys in (("bf16", {}), ("fp8", {"dispatch_dtype": "fp8"})):
        for rank, rules in enumerate(on_ranks(RANKS, calls, _case(**keys))):
            found |= {f"{name}, rank {rank}: {rule}": holds for rule, holds in rules.items()}
    for rank, rules in enumerate(on_ranks(RANKS, overflow, _case(prealloc_max_recv_tokens=3))):
        found |= {f"overflow, rank {rank}: {rule}": holds for rule, holds in rules.items()}
    for flaw in ("stale slot", "count kept"):
        found[f"{flaw} is noticed"] = any(on_ranks(RANKS, flawed, _case(), flaw))
    json.dump(found, sys.stdout)


def _case(**keys: Any) -> Case:
    layer = {
        "model": "custom",
        "hidden_size": 256,
        "intermediate_size": 128,
        "num_experts": EXPERTS,
        "topk": TOPK,
        "tokens": TOKENS,
        "max_dispatch_tokens_per_rank": 8,
        "transport": "symmetric",
        "device": "cpu",
        "limit": "off",
        "numerics": "gaussian",
        "require": "tolerance",
    }
    return resolve_case([Layer("test", layer | keys)], RANKS).case


def _batch(case: Case, rank: int, call: int) -> TokenBatch:
    """Rows that say whose they are, and ids with twins, -1 and one past the last expert."""
    count = TOKENS[rank]
    numbers = (call * 1000 + rank * 100 + torch.arange(count)).float()
    hidden = (numbers.unsqueeze(1) + torch.arange(case.hidden_size) / 4096).bfloat16()
    generator = torch.Generator().manual_seed(100 * call + rank)
    ids = torch.randint(-1, EXPERTS + 1, (count, TOPK), generator=generator).int()
    weights = torch.rand(count, TOPK, generator=generator)
    if case.dispatch_dtype == "bf16":
        return TokenBatch(hidden, None, weights, ids)
    scales = numbers.unsqueeze(1).expand(count, case.hidden_size // 128).contiguous()
    return TokenBatch(hidden.to(torch.float8_e4m3fn), scales, weights, ids)


def _transport(session: Session, case: Case) -> SymmetricTransport:
    session.use("cpu")
    like, counts = _batch(case, session.rank, 0), torch.zeros(RANKS, RANKS, dtype=torch.int64)
    return SymmetricTransport(
        TransportContext(case, None, session.rank, session.device, session.group, counts, like, session)
    )


def calls(session: Session, case: Case) -> dict[str, bool]:
    """Three calls of one transport, the last with rows cut off."""
    transport = _transport(session, case)
    found: dict[str, bool] = {}
    for call in range(3):
        transport.forget()
        batches = [_batch(case, rank, call) for rank in range(RANKS)]
        mine = batches[session.rank]
        received = transport.dispatch(mine)
        sources = transport.sources()
        found |= {f"{call} {rule}": holds for rule, holds in _received(case, session.rank, received, sources, batches)}
        kept = len(sources) if call < 2 else len(sources) // 2
        rows = _expert_rows(session.rank, sources, case)[:kept]
        returned = [one[:, :2].tolist() for one in _gathered(session, sources[:kept])]
        combined = transport.combine(rows, mine.ids)
        found[f"{call} sum"] = _same(combined, _expected(case, session.rank, mine, returned))
    transport.close()
    return found


def _received(
    case: Case, rank: int, received: Dispatched, sources: Tensor, batches: list[TokenBatch]
) -> list[tuple[str, bool]]:
    wanted = {
        (source, token)
        for source, batch in enumerate(batches)
        for token in destinations(batch.ids, case.experts_per_rank, RANKS)[:, rank].nonzero().flatten().tolist()
    }
    total = int(received.total_recv)
    if sorted(wanted) != sorted((one, two) for one, two in sources.tolist()):
        return [("each row once", False)]
    rows = [[part[token] for part in batches[source] if part is not None] for source, token in sources.tolist()]
    same = all(
        torch.equal(field[slot].view(torch.uint8), part.view(torch.uint8))
        for slot, parts in enumerate(rows)
        for field, part in zip(received.fields(), parts, strict=True)
    )
    untouched = bool((received.ids[total:] > EXPERTS).all())
    return [
        ("each row once", True),
        ("bits", same),
        ("poison behind", untouched),
        ("total", total == len(wanted)),
    ]


def _expert_rows(rank: int, sources: Tensor, case: Case) -> Tensor:
    """A rank's row for each token: numbers whose sum in float32 needs a rounding to bf16."""
    values = sources[:, 0] * 10 + sources[:, 1] + (rank + 1) * 257 / 256
    return (values.unsqueeze(1) + torch.arange(case.hidden_size) / 64).bfloat16()


def _expected(case: Case, rank: int, batch: TokenBatch, returned: list[list[list[int]]]) -> Tensor:
    total = torch.zeros(len(batch.ids), case.hidden_size)
    for token, ids in enumerate(batch.ids.tolist()):
        owners = dict.fromkeys(one // case.experts_per_rank for one in ids if 0 <= one < EXPERTS)
        for owner in owners:
            there = [rank, token] in returned[owner]
            row = _expert_rows(owner, torch.tensor([[rank, token]]), case)[0].float()
            total[token] += row if there else float("nan")
    return total.bfloat16()


def _gathered(session: Session, sources: Tensor) -> list[Tensor]:
    room = torch.full((16, 2), -1, dtype=torch.int64)
    room[: len(sources)] = sources
    return list(session.everyones(room.flatten()).view(RANKS, 16, 2))


def _same(one: Tensor, two: Tensor) -> bool:
    return torch.equal(one.isnan(), two.isnan()) and torch.equal(one.nan_to_num(), two.nan_to_num())


def overflow(session: Session, case: Case) -> dict[str, bool]:
    """A buffer of three rows, to which eight want to go."""
    transport = _transport(session, case)
    mine = _batch(case, session.rank, 0)
    mine.ids.fill_(0)
    received = transport.dispatch(mine)
    told = ""
    try:
        transport.sources()
    except DistbenchError as error:
        told = str(error)
    combined = transport.combine(received.hidden, mine.ids)
    lost = session.everyones(combined.isnan().any().view(1)).any()
    transport.close()
    first = session.rank == 0
    return {
        "count": int(received.total_recv) == (3 if first else 0),
        "told": ("was to receive 8 rows, its buffer has 3; 5 were not written" in told) == first,
        "lost rows are NaN": bool(lost),
    }


def flawed(session: Session, case: Case, flaw: str) -> bool:
    """Whether two calls in which rank 0 imitates a fault give any rank wrong rows."""
    transport, wrong = _transport(session, case), False
    for call in range(2):
        if flaw == "count kept" and session.rank == 0:
            transport.leave_count(2)
        transport.forget()
        batches = [_batch(case, rank, call) for rank in range(RANKS)]
        transport.flaw = flaw if session.rank == 0 and flaw != "count kept" else ""
        received = transport.dispatch(batches[session.rank])
        found = _received(case, session.rank, received, transport.sources(), batches)
        wrong |= not all(holds for _, holds in found)
        transport.combine(received.hidden, batches[session.rank].ids)
    transport.close()
    return wrong


if __name__ == "__main__":
    main()
