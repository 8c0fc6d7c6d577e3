"""Rows moved and added by Triton's interpreter against torch's operations, as one JSON object. Run as a script."""

from __future__ import annotations

import itertools
import json
import os
import sys

import torch
from torch import Tensor

from distbench.transport.base import POISON_ID, poison_
from distbench.transport.collective.arrival import Arrivals, Geometry, RowCounts
from distbench.transport.collective.route import DispatchState, Mover, Route, lanes_of, lay_out, sent_rows, words
from distbench.transport.collective.rows import TorchRows
from distbench.transport.collective.triton_rows import TritonRows
from distbench.workload.batch import TokenBatch
from distbench.workload.routing import destinations

RANKS, RANK, EXPERTS, TOKENS = 3, 1, 6, 9


def main() -> None:
    found, poison = {}, []
    for (columns, topk, fp8), kept in itertools.product([(256, 3, False), (256, 2, True), (77, 1, False)], (1, 0.5, 0)):
        ours, theirs = (_ends(mover, columns, topk, kept, fp8=fp8) for mover in (TritonRows, TorchRows))
        for name in theirs:
            found[f"{columns} {topk} {kept} {name}"] = torch.equal(ours[name], theirs[name])
        poison.append(theirs["sum is NaN"].flatten())
        found[f"{columns} {topk} {kept} numbers poisoned"] = bool((ours["numbers"] == POISON_ID).all())
        if kept == 1:
            found[f"{columns} {topk} rows poisoned"] = bool(ours["rows poisoned"].all())
    found["some sums are poison"] = 0 < int(torch.cat(poison).sum()) < torch.cat(poison).numel()
    json.dump(found, sys.stdout)


def _ends(make: type[TorchRows | TritonRows], columns: int, topk: int, kept: float, *, fp8: bool) -> dict[str, Tensor]:
    """All tensors that a mover of the middle rank writes, with random rows of its peers."""
    generator = torch.Generator().manual_seed(columns)
    batch = _batch(generator, columns, topk, fp8=fp8)
    counts = torch.randint(1, TOKENS, (RANKS, RANKS), generator=generator)
    counts[RANK] = destinations(batch.ids, EXPERTS // RANKS, RANKS).sum(0)
    traffic = RowCounts(Geometry(RANK, RANKS, EXPERTS, 64, counts))
    mover: Mover = make(traffic)
    parts = [part for part in batch if part is not None]
    buffers = [part.new_empty(traffic.total_received, part.shape[1]) for part in parts]
    route = _route(batch.ids, traffic, buffers, generator)
    plan = DispatchState(route, *Arrivals(traffic, torch.device("cpu"), seed=3, shuffled=True).next())
    fields = [words(part.contiguous()) for part in parts]
    mover.leave(fields, route)
    mover.stay(fields, plan)
    total_recv = torch.zeros(1, dtype=torch.int32)
    mover.arrive(plan, total_recv)
    expert_out = _awkward(generator, int(kept * traffic.total_received), columns)
    back = mover.send_back(expert_out, plan).view(expert_out.dtype)
    returned = mover.room(expert_out).view(expert_out.dtype)
    returned[:] = _awkward(generator, traffic.leaving, columns)
    mover.stay_back(expert_out, plan)
    slots = torch.randint(traffic.total_sent + 2, (TOKENS, topk), generator=generator)
    total = mover.add(expert_out, plan, slots)
    ends = {f"buffer {index}": buffer.view(torch.uint8) for index, buffer in enumerate(buffers)}
    ends |= {"total_recv": total_recv, "numbers": route.peers_numbers.clone()}
    if kept == 1:
        mover.leave(fields, route)  # the next dispatch
        mover.stay(fields, plan)
        ends |= {"rows poisoned": returned[:, :8].isnan()}
    ends |= {"outgoing": torch.cat([lane.leaving.view(torch.uint8) for lane in route.lanes], dim=1)}
    for name, rows in (("back", back), ("sum", total)):
        ends |= {name: rows.nan_to_num(1.5).view(torch.int16), f"{name} is NaN": rows.isnan()}
    return ends


def _batch(generator: torch.Generator, columns: int, topk: int, *, fp8: bool) -> TokenBatch:
    hidden = torch.randint(0, 256, (TOKENS, columns * (1 if fp8 else 2)), generator=generator, dtype=torch.uint8)
    return TokenBatch(
        hidden.view(torch.float8_e4m3fn if fp8 else torch.bfloat16),
        torch.rand(TOKENS, columns // 128, generator=generator) if fp8 else None,
        torch.rand(TOKENS, topk, generator=generator),
        torch.rand(TOKENS, EXPERTS, generator=generator).argsort(1)[:, :topk].int(),
    )


def _route(ids: Tensor, traffic: RowCounts, buffers: list[Tensor], generator: torch.Generator) -> Route:
    layout = lay_out(buffers)
    tokens, position = sent_rows(destinations(ids, EXPERTS // RANKS, RANKS), traffic)
    outgoing, incoming = (
        torch.randint(0, 256, (rows, layout.row_bytes), generator=generator, dtype=torch.uint8)
        for rows in (traffic.leaving, traffic.total_received)
    )
    numbers = incoming[:, layout.number : layout.number + 4].view(torch.int32)
    arriving = traffic.arriving
    lanes = lanes_of(layout, buffers, outgoing, incoming, arriving)
    leaving, staying = tokens[: traffic.leaving], tokens[traffic.leaving :]
    received = incoming, incoming[:arriving], numbers[:, 0], numbers[:arriving, 0]
    return Route(ids, ids, leaving, staying, position, outgoing, *received, lanes)


def _awkward(generator: torch.Generator, rows: int, columns: int) -> Tensor:
    """bf16 rows whose sums depend on the order of additions: large numbers that cancel, and zeros of both signs."""
    choices = torch.tensor([2.0**30, -(2.0**30), 1.0, 3.0, 0.0, -0.0], dtype=torch.bfloat16)
    values = choices[torch.randint(len(choices), (rows, columns), generator=generator)]
    if rows:
        poison_(values[-1])
    return values


if __name__ == "__main__":
    assert os.environ["TRITON_INTERPRET"] == "1"
    main()
