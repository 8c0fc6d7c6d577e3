"""How rank 0 gets every rank's rows and compares them itself, in memory that no number of ranks or tokens enlarges.

Each rank sends its record and then its outputs, one bounded chunk at a time, rank after rank: whole rows, or 128-bit
digests where rows would be many, followed by those rows whose digests differ.
"""

from __future__ import annotations

from typing import Literal

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from distbench.verify.bitwise import compare_rows, differing, row_digests
from distbench.verify.records import (
    LISTED_TOKENS,
    NO_DIFFERENCE,
    Gathered,
    Observation,
    RowComparison,
    pair_name,
    pairs_of,
)

CHUNK_BYTES = 8 << 20
ROWS_UP_TO_BYTES = 64 << 20
FETCHED_TOKENS = 4

Mode = Literal["rows", "digests"]
Outputs = dict[str, Tensor]


def choose_mode(asked: str, tokens: tuple[int, ...], arms: int, row_bytes: int) -> Mode:
    """Return `rows` or `digests`: what was asked for, or by the bytes that rank 0 would read."""
    if asked == "rows" or (asked == "auto" and sum(tokens) * arms * row_bytes <= ROWS_UP_TO_BYTES):
        return "rows"
    return "digests"


def gather(
    group: dist.ProcessGroup, mode: Mode, tokens: tuple[int, ...], observation: Observation, outputs: Outputs
) -> Gathered | None:
    """Bring all ranks' outputs [n, H] to rank 0, which returns what it found; the others return None. Collective.

    `outputs` has the same arms in the same order on every rank.
    """
    rank, device = dist.get_rank(group), next(iter(outputs.values())).device
    stacked = torch.stack(list(outputs.values()), dim=1)
    payload = stacked if mode == "rows" else torch.stack([row_digests(rows) for rows in outputs.values()], dim=1)
    if rank != 0:
        _send_record(group, observation, device)
        _send_chunks(group, payload)
        if mode == "digests":
            _answer_requests(group, stacked)
        return None
    reader = _Reader(tuple(outputs), mode, payload)
    records = [observation]
    reader.take(0, payload)
    for sender in range(1, len(tokens)):
        records.append(_receive_record(group, sender, device))
        _receive_chunks(group, sender, tokens[sender], payload, reader)
    if mode == "digests":
        _fetch_differing(group, reader, stacked, len(tokens))
    return reader.finish(records)


class _Reader:
    """Compares chunk after chunk, keeping counts and the first differing tokens only."""

    def __init__(self, arms: tuple[str, ...], mode: Mode, like: Tensor) -> None:
        self._pairs = [(pair_name(pair), arms.index(pair[0]), arms.index(pair[1])) for pair in pairs_of(arms)]
        self._mode = mode
        self._like = like
        self._disputed: set[int] = set()
        self._per_rank: dict[int, dict[str, RowComparison]] = {}
        self.differing: dict[str, list[tuple[int, int]]] = {name: [] for name, _, _ in self._pairs}

    def take(self, rank: int, chunk: Tensor, start: int = 0) -> None:
        """Compare a chunk [c, arms, columns] of `rank`'s tokens from `start` on."""
        found = self._per_rank.setdefault(rank, {name: NO_DIFFERENCE for name, _, _ in self._pairs})
        for name, first, second in self._pairs:
            result = compare_rows(chunk[:, second], chunk[:, first])
            found[name] = found[name].plus(result)
            if not result.equal:
                self._list_tokens(name, rank, start, differing(chunk[:, second], chunk[:, first]))

    def _list_tokens(self, name: str, rank: int, start: int, wrong: Tensor) -> None:
        listed = self.differing[name]
        tokens = wrong.any(1).nonzero().flatten()[: LISTED_TOKENS - len(listed)].tolist()
        listed += [(rank, start + token) for token in tokens]

    def requests(self, rank: int) -> list[int]:
        """Return up to FETCHED_TOKENS differing tokens of `rank`, over all pairs."""
        tokens = sorted({token for listed in self.differing.values() for owner, token in listed if owner == rank})
        return tokens[:FETCHED_TOKENS]

    def confirm(self, rank: int, rows: Tensor) -> None:
        """Dispute a rank whose fetched rows [c, arms, H] do not differ although their digests did."""
        if all(compare_rows(rows[:, second], rows[:, first]).equal for _, first, second in self._pairs):
            self._disputed.add(rank)

    def finish(self, records: list[Observation]) -> Gathered:
        """Return the whole, the ranks' records beside it."""
        disputed = sorted(self._disputed | {record.rank for record in records if not self._agrees(record)})
        total = {name: NO_DIFFERENCE for name, _, _ in self._pairs}
        for record in records:
            # Digests tell which tokens differ; in how many elements and how far, only their rank has seen.
            seen = self._per_rank[record.rank] if self._mode == "rows" else record.comparisons
            total = {name: found.plus(seen[name]) for name, found in total.items()}
        return Gathered(records, total, self.differing, disputed, self._mode)

    def _agrees(self, record: Observation) -> bool:
        mine = self._per_rank[record.rank]
        return all(mine[name].differing_tokens == record.comparisons[name].differing_tokens for name in mine)


def _send_record(group: dist.ProcessGroup, observation: Observation, device: torch.device) -> None:
    content = torch.frombuffer(bytearray(msgspec.json.encode(observation)), dtype=torch.uint8).to(device)
    dist.send(torch.tensor([content.numel()], device=device), group=group, group_dst=0)
    dist.send(content, group=group, group_dst=0)


def _receive_record(group: dist.ProcessGroup, sender: int, device: torch.device) -> Observation:
    size = torch.zeros(1, dtype=torch.int64, device=device)
    dist.recv(size, group=group, group_src=sender)
    content = torch.empty(int(size), dtype=torch.uint8, device=device)
    dist.recv(content, group=group, group_src=sender)
    host = bytearray(int(size))
    torch.frombuffer(host, dtype=torch.uint8).copy_(content)
    return msgspec.json.decode(host, type=Observation)


def _send_chunks(group: dist.ProcessGroup, payload: Tensor) -> None:
    for chunk in payload.split(_chunk_rows_of(payload)):
        if chunk.numel():
            dist.send(chunk.contiguous().view(torch.uint8), group=group, group_dst=0)


def _receive_chunks(group: dist.ProcessGroup, sender: int, num_tokens: int, like: Tensor, reader: _Reader) -> None:
    step = _chunk_rows_of(like)
    reader.take(sender, like[:0])
    for start in range(0, num_tokens, step):
        chunk = like.new_empty(min(step, num_tokens - start), *like.shape[1:])
        dist.recv(chunk.view(torch.uint8), group=group, group_src=sender)
        reader.take(sender, chunk, start)


def _chunk_rows_of(payload: Tensor) -> int:
    row_bytes = payload.shape[1] * payload.shape[2] * payload.element_size()
    return max(CHUNK_BYTES // row_bytes, 1)


def _answer_requests(group: dist.ProcessGroup, stacked: Tensor) -> None:
    request = torch.empty(FETCHED_TOKENS, dtype=torch.int64, device=stacked.device)
    dist.recv(request, group=group, group_src=0)
    tokens = request[request >= 0]
    if tokens.numel():
        dist.send(stacked[tokens].view(torch.uint8), group=group, group_dst=0)


def _fetch_differing(group: dist.ProcessGroup, reader: _Reader, like: Tensor, num_ranks: int) -> None:
    for rank in range(1, num_ranks):
        tokens = reader.requests(rank)
        request = torch.tensor(tokens + [-1] * (FETCHED_TOKENS - len(tokens)), device=like.device)
        dist.send(request, group=group, group_dst=rank)
        if tokens:
            rows = like.new_empty(len(tokens), *like.shape[1:])
            dist.recv(rows.view(torch.uint8), group=group, group_src=rank)
            reader.confirm(rank, rows)
