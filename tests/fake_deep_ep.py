"""deep_ep without its compiled module: the released Python, over kernels in torch that move rows between CPU ranks.

What a transport passes therefore goes through the real signatures, and what it gets has the real order and shapes. The
kernels here follow those of DeepEP (`csrc/kernels/legacy`): rows of `intranode_dispatch` lie by source rank and token,
with ids of the receiver's experts, numbered on it, and combine adds ranks in the order of their numbers;
`low_latency_dispatch` gives each expert a block, whose source ranks stand in a shuffled order.
"""

from __future__ import annotations

import importlib
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distbench.case.plugins import Plugin
from distbench.plugins import Transport, TransportContext
from distbench.transport.deepep.transport import Options
from distbench.transport.deepep.transport import make as deepep

FILES = ("deep_ep/buffers/legacy.py", "deep_ep/utils/event.py", "deep_ep/utils/envs.py", "deep_ep/utils/comm.py")


def install(folder: Path) -> None:
    """Make `deep_ep` importable in this process, from the files of a wheel in `folder`."""
    compiled: Any = ModuleType("deep_ep._C")
    compiled.Config, compiled.EventHandle, compiled.Buffer = Config, object, Runtime
    compiled.get_low_latency_rdma_size_hint = lambda tokens, hidden, ranks, experts: tokens * hidden * ranks * experts
    package: Any = ModuleType("deep_ep")
    package.__path__ = [str(folder / "deep_ep")]
    sys.modules.update({"deep_ep": package, "deep_ep._C": compiled})
    legacy: Any = importlib.import_module("deep_ep.buffers.legacy")
    legacy.check_nvlink_connections = lambda _: None  # which asks the device for its name
    package.Buffer, package.topk_idx_t, package.__version__ = legacy.Buffer, torch.int64, "fake"
    Runtime.spoils = ""


def unpack(wheel: zipfile.ZipFile, folder: Path) -> None:
    """Write the files that `install` reads."""
    for name in FILES:
        wheel.extract(name, folder)


class Config:
    """Sizes of a kernel's queues."""

    def __init__(self, *sizes: int) -> None:
        self.sizes = sizes

    def get_nvl_buffer_size_hint(self, row_bytes: int, ranks: int) -> int:
        return row_bytes * ranks * self.sizes[0]

    def get_rdma_buffer_size_hint(self, row_bytes: int, ranks: int) -> int:
        return row_bytes if ranks > 8 else 0


class Runtime:
    """The compiled buffer of one rank."""

    spoils = ""
    """A kernel's bug, by name, on rank 0."""

    def __init__(self, rank: int, ranks: int, *_: Any) -> None:
        self.rank, self.ranks = rank, ranks
        self._calls = 0

    def get_local_device_id(self) -> int:
        return self.rank

    def get_local_ipc_handle(self) -> bytes:
        return b""

    def get_local_nvshmem_unique_id(self) -> bytes:
        return b"id"

    def get_num_rdma_ranks(self) -> int:
        return 1

    def sync(self, devices: list[int], *_: Any) -> None:
        assert devices == list(range(self.ranks))

    def is_available(self) -> bool:
        return True

    def destroy(self) -> None:
        self.ranks = 0

    def get_dispatch_layout(self, ids: Tensor, experts: int, *_: Any) -> tuple[Any, ...]:
        per_rank = experts // self.ranks
        there = torch.stack([(ids.div(per_rank, rounding_mode="floor") == rank).any(1) for rank in range(self.ranks)])
        counts = torch.bincount(ids[ids >= 0], minlength=experts)
        return there.sum(1).int(), None, counts.int(), there.t().contiguous(), None

    def intranode_dispatch(  # noqa: PLR0913 - the compiled signature
        self,
        x: Tensor,
        scales: Tensor | None,
        ids: Tensor,
        weights: Tensor,
        _per_rank: Tensor,
        in_rank: Tensor,
        per_expert: Tensor,
        *rest: Any,
    ) -> tuple[Any, ...]:
        assert ids.dtype is torch.int64
        assert weights.dtype is torch.float32
        assert len(rest) == 9
        local = len(per_expert) // self.ranks
        everyone = _gathered((x.view(torch.uint8), scales, ids, weights, in_rank))  # fp8 cannot be pickled
        first, parts, prefix = self.rank * local, [], []
        for rows, their_scales, their_ids, their_weights, going in everyone:
            mine = going[:, self.rank].nonzero()[:, 0]
            here = (their_ids[mine] >= first) & (their_ids[mine] < first + local)
            parts.append(
                (
                    rows[mine],
                    None if their_scales is None else their_scales[mine],
                    torch.where(here, their_ids[mine] - first, -1),
                    torch.where(here, their_weights[mine], 0.0),
                    mine.int(),
                )
            )
            prefix.append(going.sum(0))
        hidden, all_scales, all_ids, all_weights, tokens = (
            None if one[0] is None else torch.cat(one) for one in zip(*parts, strict=True)
        )
        assert hidden is not None
        if Runtime.spoils == "row" and self.rank == 0:
            hidden[0, 0] ^= 1
        prefix_matrix = torch.stack(prefix).cumsum(0).int()
        return (
            *(hidden.view(x.dtype), all_scales, all_ids, all_weights, []),
            *(prefix_matrix, prefix_matrix, prefix_matrix, tokens, in_rank, None),
        )

    def intranode_combine(  # noqa: PLR0913 - the compiled signature
        self,
        x: Tensor,
        weights: Tensor | None,
        bias_0: Tensor | None,
        bias_1: Tensor | None,
        tokens: Tensor,
        prefix: Tensor,
        channels: Tensor,
        in_rank: Tensor,
        *rest: Any,
    ) -> tuple[Any, ...]:
        assert x.dtype is torch.bfloat16
        assert len(x) == len(tokens)
        assert (weights, bias_0, bias_1) == (None, None, None)
        assert len(rest) == 4
        assert channels is not None
        total = torch.zeros(len(in_rank), x.shape[1])
        for sender, (rows, their_tokens) in enumerate(_gathered((x, tokens))):
            begin = int(prefix[self.rank - 1, sender]) if self.rank else 0
            mine = slice(begin, int(prefix[self.rank, sender]))
            total.index_add_(0, their_tokens[mine].long(), rows[mine].float())
        if Runtime.spoils == "sum" and self.rank == 0:
            total *= 2
        return total.bfloat16(), None, None

    def low_latency_dispatch(self, x: Tensor, ids: Tensor, *rest: Any) -> tuple[Any, ...]:
        assert (x.dtype, ids.dtype) == (torch.bfloat16, torch.int64)
        assert len(rest) == 11
        assert not any(rest[5:])
        most, local = rest[3], rest[4] // self.ranks
        blocks = torch.full((local, self.ranks * most, x.shape[1]), float("nan")).bfloat16()
        tokens = torch.full((local, self.ranks * most), -7, dtype=torch.int32)
        ranges = torch.zeros(local, self.ranks, dtype=torch.int64)
        counts = torch.zeros(local, dtype=torch.int32)
        everyone = _gathered((x, ids))
        self._calls += 1
        for expert in range(local):
            for step in range(self.ranks):
                rank = (step + self._calls + expert) % self.ranks
                rows, their_ids = everyone[rank]
                mine = (their_ids == self.rank * local + expert).any(1).nonzero()[:, 0]
                begin, end = int(counts[expert]), int(counts[expert]) + len(mine)
                blocks[expert, begin:end], tokens[expert, begin:end] = rows[mine], mine.int()
                ranges[expert, rank] = begin << 32 | len(mine)
                counts[expert] = end
        self._spoil(blocks, tokens, counts)
        return blocks, None, counts, tokens, ranges, None, None

    def low_latency_combine(
        self, x: Tensor, ids: Tensor, weights: Tensor, tokens: Tensor, ranges: Tensor, *rest: Any
    ) -> tuple[Any, ...]:
        assert (x.dtype, ids.dtype, weights.dtype) == (torch.bfloat16, torch.int64, torch.float32)
        assert len(rest) == 11
        assert not any(rest[3:7])
        everyone = _gathered((x, tokens, ranges))
        total = torch.zeros(len(ids), x.shape[2])
        for token, slots in enumerate(ids.tolist()):
            for slot, expert in enumerate(slots):
                if expert < 0:
                    continue
                blocks, their_tokens, their_ranges = everyone[expert // len(x)]
                packed = int(their_ranges[expert % len(x), self.rank])
                begin, size = packed >> 32, packed & 0xFFFF_FFFF
                (place,) = (their_tokens[expert % len(x), begin : begin + size] == token).nonzero()[:, 0].tolist()
                total[token] += blocks[expert % len(x), begin + place].float() * weights[token, slot]
        if Runtime.spoils == "sum" and self.rank == 0:
            total *= 2
        return total.bfloat16(), None, None

    def _spoil(self, blocks: Tensor, tokens: Tensor, counts: Tensor) -> None:
        if self.rank:
            return
        several = int(counts.argmax())
        if Runtime.spoils == "row":
            blocks[several, 0] *= 2
        if Runtime.spoils == "token":
            tokens[several, 0] = tokens[several, 1]
        if Runtime.spoils == "count":
            counts[several] += 1


class FakeOptions(Options, frozen=True):
    """Options of the transport, where the wheel's files lie, and a bug."""

    folder: str = ""
    spoils: str = ""


def make(context: TransportContext) -> Transport:
    """The transport deepep over the fake package."""
    install(Path(context.options.folder))
    Runtime.spoils = context.options.spoils
    return deepep(context)


PLUGIN = Plugin(make=make, options=FakeOptions)


def _gathered(parts: tuple[Any, ...]) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, parts)
    return found
