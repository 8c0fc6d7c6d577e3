"""Rank 0's collection and comparison of all ranks' rows, in memory that does not grow with the number of tokens.

All ranks send their records, then their outputs in rounds of one small block each, so that a round has a bounded size.
A block holds whole rows, or 128-bit digests where rows would be too many; rows whose digests differ follow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from distbench.distributed.session import Session
from distbench.distributed.waits import waiting
from distbench.utils.process import peak_bytes
from distbench.verify.pairs import pair_name, pairs_of
from distbench.verify.records import LISTED_TOKENS, NO_DIFFERENCE, Gathered, Observation
from distbench.verify.row_compare import compare_rows, differing, row_digests, same_bits

ROUND_BYTES = 16 << 20
ROWS_UP_TO_BYTES = 64 << 20
FETCHED_TOKENS = 4
_RECORD_BYTES = 16 << 10
_MESSAGE = "message of a peer"

Mode = Literal["rows", "digests"]


class Outputs(NamedTuple):
    """A rank's outputs: the arms' names, their tokens [n, arms, H], and the tokens' digests, int64 [n, arms, 2].

    `alike` says that all arms have the same bits.
    """

    arms: tuple[str, ...]
    rows: Tensor
    digests: Tensor
    alike: bool


def outputs_of(arms: Mapping[str, Tensor]) -> Outputs:
    """Return the tokens [n, H] of all arms as one; equal arms are digested once. Digests are on the CPU."""
    rows = torch.stack(list(arms.values()), dim=1)
    alike = _are_alike(rows)
    if alike:
        digests = row_digests(rows[:, 0]).cpu().unsqueeze(1).expand(*rows.shape[:2], 2).contiguous()
    else:
        digests = row_digests(rows.flatten(0, 1)).cpu().view(*rows.shape[:2], 2)
    return Outputs(tuple(arms), rows, digests, alike)


def choose_mode(asked: str, tokens: tuple[int, ...], token_bytes: int) -> Mode:
    """Return `rows` or `digests`: the mode asked for, or the choice by the bytes that rank 0 would read."""
    if asked == "rows" or (asked == "auto" and sum(tokens) * token_bytes <= ROWS_UP_TO_BYTES):
        return "rows"
    return "digests"


def gather(
    session: Session, mode: Mode, tokens: tuple[int, ...], parts: Sequence[tuple[Observation, Outputs]]
) -> list[Gathered] | None:
    """Gather all ranks' outputs on rank 0, which returns the findings; the others return None. Collective.

    `parts` has the observations with each kind of inputs, and rank 0 returns one result for each. The outputs have the
    same arms in the same order on every rank.
    """
    payloads = [outputs.rows if mode == "rows" else outputs.digests for _, outputs in parts]
    records = _gather_records(session, [observation for observation, _ in parts])
    readers = [_Reader(outputs.arms, mode, len(tokens) if records else 0) for _, outputs in parts]
    for start, blocks in _gather_blocks(session, payloads, tokens):
        for rank, block in enumerate(blocks):
            chunks = block[: max(tokens[rank] - start, 0)].split([payload.shape[1] for payload in payloads], dim=1)
            for reader, chunk in zip(readers, chunks, strict=True):
                reader.take(rank, chunk, start)
    if mode == "digests":
        for reader, (_, outputs) in zip(readers, parts, strict=True):
            _fetch_differing(session.group, reader, outputs.rows)
    return [reader.finish(seen) for reader, seen in zip(readers, records, strict=True)] if records else None


class _Reader:
    """Compares chunk by chunk; keeps only counts and the first differing tokens."""

    def __init__(self, arms: tuple[str, ...], mode: Mode, num_ranks: int) -> None:
        self._pairs = [(pair_name(pair), arms.index(pair[0]), arms.index(pair[1])) for pair in pairs_of(arms)]
        self._mode = mode
        self._disputed: set[int] = set()
        self._per_rank = [dict.fromkeys((name for name, _, _ in self._pairs), NO_DIFFERENCE) for _ in range(num_ranks)]
        self.differing: dict[str, list[tuple[int, int]]] = {name: [] for name, _, _ in self._pairs}

    def take(self, rank: int, chunk: Tensor, start: int = 0) -> None:
        """Compare a chunk [c, arms, columns] of `rank`'s tokens from `start` on."""
        if _are_alike(chunk):
            return
        found = self._per_rank[rank]
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
        """Dispute a rank whose fetched rows [c, arms, H] are equal although their digests differed."""
        if all(compare_rows(rows[:, second], rows[:, first]).equal for _, first, second in self._pairs):
            self._disputed.add(rank)

    def finish(self, records: list[Observation]) -> Gathered:
        """Return the complete result with the ranks' records."""
        disputed = sorted(self._disputed | {record.rank for record in records if not self._agrees(record)})
        total = {name: NO_DIFFERENCE for name, _, _ in self._pairs}
        for record in records:
            # Digests show which tokens differ; only their rank knows the number of elements and the distance.
            seen = self._per_rank[record.rank] if self._mode == "rows" else record.comparisons
            total = {name: found.plus(seen[name]) for name, found in total.items()}
        return Gathered(records, total, self.differing, disputed, self._mode, peak_bytes())

    def _agrees(self, record: Observation) -> bool:
        mine = self._per_rank[record.rank]
        return all(mine[name].differing_tokens == record.comparisons[name].differing_tokens for name in mine)


def _are_alike(rows: Tensor) -> bool:
    """Whether rows [n, arms, .] hold the same bits in every arm."""
    return same_bits(rows[:, 1:], rows[:, :1].expand_as(rows[:, 1:]))


def _gather_records(session: Session, mine: list[Observation]) -> list[list[Observation]]:
    """Return all ranks' records of each part on rank 0, nothing elsewhere.

    A record travels with its length in front, up to `_RECORD_BYTES`; the rest of a longer one follows. Records travel
    between CPUs even where the payload is on a device: NCCL makes a communicator for each pair that sends by itself.
    """
    content = msgspec.json.encode(mine)
    framed = torch.frombuffer(bytearray(len(content).to_bytes(8, "little") + content), dtype=torch.uint8)
    head, rest = framed[:_RECORD_BYTES], framed[_RECORD_BYTES:]
    heads = session.gathered(torch.cat([head, head.new_zeros(_RECORD_BYTES - head.numel())]))
    if rest.numel() and session.rank != 0:
        with waiting(_MESSAGE):
            dist.send(rest, group=session.group, group_dst=0)
    records = []
    for rank, raw in enumerate(heads):
        size = 8 + int.from_bytes(raw[:8].tolist(), "little")
        tail = rest if rank == 0 else raw.new_empty(max(size - _RECORD_BYTES, 0))
        if tail.numel() and rank != 0:
            with waiting(_MESSAGE):
                dist.recv(tail, group=session.group, group_src=rank)
        whole = torch.cat([raw, tail])[8:size].numpy().tobytes()
        records.append(msgspec.json.decode(whole, type=list[Observation]))
    return [list(part) for part in zip(*records, strict=True)]


def _gather_blocks(
    session: Session, payloads: list[Tensor], tokens: tuple[int, ...]
) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield, for each round, the first token of all ranks' blocks and the blocks; blocks only on rank 0.

    A block has the arms of all payloads [n, arms, .], one after another.
    """
    most = max(tokens)
    row_bytes = sum(payload.shape[1] * payload.shape[2] * payload.element_size() for payload in payloads)
    step = max(min(ROUND_BYTES // (row_bytes * len(tokens)), most), 1)
    for start in range(0, most, step):
        parts = [payload[start : start + step] for payload in payloads]
        block = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        if block.shape[0] < step:
            block = torch.cat([block, block.new_zeros(step - block.shape[0], *block.shape[1:])])
        yield start, list(session.gathered(block.contiguous().view(torch.uint8)).view(block.dtype))


def _fetch_differing(group: dist.ProcessGroup, reader: _Reader, rows: Tensor) -> None:
    """Fetch each rank's first differing rows to rank 0, which confirms that they differ."""
    if dist.get_rank(group) != 0:
        _answer_request(group, rows)
        return
    for rank in range(1, dist.get_world_size(group)):
        tokens = reader.requests(rank)
        request = torch.tensor(tokens + [-1] * (FETCHED_TOKENS - len(tokens)))
        fetched = torch.empty(len(tokens), *rows.shape[1:], dtype=rows.dtype)
        with waiting(_MESSAGE):
            dist.send(request, group=group, group_dst=rank)
            if tokens:
                dist.recv(fetched.view(torch.uint8), group=group, group_src=rank)
        if tokens:
            reader.confirm(rank, fetched)


def _answer_request(group: dist.ProcessGroup, rows: Tensor) -> None:
    request = torch.empty(FETCHED_TOKENS, dtype=torch.int64)
    with waiting(_MESSAGE):
        dist.recv(request, group=group, group_src=0)
    tokens = request[request >= 0].to(rows.device)
    if tokens.numel():
        listed = rows[tokens].cpu().view(torch.uint8)
        with waiting(_MESSAGE):
            dist.send(listed, group=group, group_dst=0)
