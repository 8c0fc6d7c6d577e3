"""Calls of transport symmetric with random delays between ranks: new tokens and routing in each, every row compared.

Start it under torchrun, a rank for each device: torchrun --nproc-per-node 4 scripts/soak_symmetric.py. With fewer
devices than ranks they share them, and rank 0 says so. It prints wrong rows and tokens of each rank, and the median
host time of a call.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time

import torch
from torch import Tensor

from distbench.case.resolve import Layer, resolve_case
from distbench.case.spec import Case
from distbench.distributed.heartbeat import Heartbeat
from distbench.distributed.session import Session
from distbench.transport import make_transport
from distbench.transport.base import Transport
from distbench.workload.batch import TokenBatch

TIMEOUT_S = 120.0
COLUMNS, TOPK, EXPERTS = 1024, 8, 32
PERIOD = 251
"""Values of a row: their sums over at most 32 ranks are whole numbers that bf16 rounds."""


def main() -> int:
    """Run the calls, and return 1 if a row or a token is wrong on any rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--delay-us", type=float, default=1000.0, help="longest delay of a rank, in a third of calls")
    options = parser.parse_args()
    on_device = options.device == "cuda"
    session = Session(Heartbeat(None), TIMEOUT_S, accelerated=on_device, shares=True)
    session.use(options.device, shared=on_device)
    with torch.inference_mode():
        wrong, host_us = _soak(session, _case(options, session.world_size), options)
    table = session.everyones(wrong.cpu()).tolist()
    if session.rank == 0:
        where = "a shared device" if session.shares_devices else str(session.device)
        print(f"{session.world_size} ranks, {where}, {options.calls} calls, {options.tokens} tokens a rank: "
              f"wrong rows and tokens by rank {table}; "
              f"host {host_us[0]:.1f} us a dispatch, {host_us[1]:.1f} us a combine")  # fmt: skip
    session.close()
    return int(any(map(any, table)))


def _case(options: argparse.Namespace, ranks: int) -> Case:
    keys = {
        "model": "custom",
        "hidden_size": COLUMNS,
        "intermediate_size": 256,
        "num_experts": EXPERTS,
        "topk": TOPK,
        "tokens": options.tokens,
        "max_dispatch_tokens_per_rank": options.tokens,
        "transport": "symmetric",
        "limit": "off",
    }
    return resolve_case([Layer("soak", keys)], ranks).case


def _soak(session: Session, case: Case, options: argparse.Namespace) -> tuple[Tensor, tuple[float, float]]:
    """Wrong received rows and wrong tokens, int64 [2], and the median microseconds of the host in both calls."""
    device, ranks, tokens = session.device, session.world_size, options.tokens
    like = TokenBatch(
        hidden=torch.zeros(tokens, COLUMNS, dtype=torch.bfloat16, device=device),
        scales=None,
        weights=torch.ones(tokens, TOPK, device=device),
        ids=torch.zeros(tokens, TOPK, dtype=torch.int32, device=device),
    )
    transport = make_transport(session, case, torch.zeros(ranks, ranks, dtype=torch.int64), like)
    generator = torch.Generator(device).manual_seed(session.rank)
    chance = random.Random(session.rank)  # noqa: S311 - delays, no secret
    wrong, host = torch.zeros(2, dtype=torch.int64, device=device), []
    for call in range(options.calls):
        _draw(like, session.rank, call, generator)
        if chance.random() < 1 / 3:
            time.sleep(chance.random() * options.delay_us / 1e6)
        wrong_here, times = _call(transport, like, call, case)
        wrong += wrong_here
        host.append(times)
    transport.close()
    dispatch, combine = (statistics.median(column) for column in zip(*host, strict=True))
    return wrong, (dispatch, combine)


def _draw(batch: TokenBatch, rank: int, call: int, generator: torch.Generator) -> None:
    """Fill the batch with the tokens of a call; a fifth of them go nowhere."""
    tokens, device = len(batch.ids), batch.ids.device
    experts = torch.rand(tokens, EXPERTS, generator=generator, device=device).topk(TOPK, 1).indices
    nowhere = torch.rand(tokens, generator=generator, device=device) < 0.2  # noqa: PLR2004 - a fifth
    batch.ids.copy_(experts.masked_fill(nowhere.unsqueeze(1), -1))
    places = torch.arange(tokens, device=device)
    batch.hidden.copy_(_rows(torch.full_like(places, rank), places, call))


def _rows(ranks: Tensor, tokens: Tensor, call: int) -> Tensor:
    """Content of the rows of a call, a function of their places."""
    numbers = (ranks * 7919 + tokens * 104_729 + call * 31) % PERIOD
    return (numbers.unsqueeze(1) + torch.arange(COLUMNS, device=ranks.device) % 5).bfloat16()


def _call(transport: Transport, batch: TokenBatch, call: int, case: Case) -> tuple[Tensor, tuple[float, float]]:
    """Dispatch, and send each row back as it came: a token is its row, as often as it has ranks."""
    began = time.perf_counter()
    received = transport.dispatch(batch)
    dispatched = time.perf_counter()
    sources = transport.sources()
    rows = received.hidden[: len(sources)]
    differs = (rows != _rows(sources[:, 0], sources[:, 1], call)).any(1).sum()
    begin = time.perf_counter()
    combined = transport.combine(received.hidden, batch.ids)
    host = (dispatched - began) * 1e6, (time.perf_counter() - begin) * 1e6
    owners = batch.ids.clamp(min=0).long() // case.experts_per_rank
    counts = torch.zeros(len(owners), case.ep_size, device=owners.device).scatter_add_(
        1, owners, (batch.ids >= 0).float()
    )
    expected = ((counts > 0).sum(1, keepdim=True).float() * batch.hidden.float()).bfloat16()
    return torch.stack([differs, (combined != expected).any(1).sum()]), host


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
