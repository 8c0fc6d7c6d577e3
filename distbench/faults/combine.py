"""Faults of combine: its input, its sum, and its output."""

from __future__ import annotations

import torch
from torch import Tensor

from distbench.case.stages import Stage
from distbench.faults.base import Fault
from distbench.faults.dispatch import BIT, flip
from distbench.faults.options import real
from distbench.transport.base import Dispatched
from distbench.workload.quantize import fp8_dtype, saturated
from distbench.workload.routing import destinations


class TokenBit(Fault):
    """One bit of one token's result is wrong, on one rank only."""

    name, stage = "flipped-token-bit", Stage.COMBINE
    bug = "legacy-rocm-build 6565: a rank other than 0 is wrong, and a verdict of rank 0 alone says all is right"
    options = {"bit": BIT}

    def combined(self, tokens: Tensor) -> Tensor:
        """Flip bit `bit` of a token, a random one if negative."""
        if tokens.shape[0]:
            bit = self.chosen["bit"]
            flip(tokens, self.pick(tokens.shape[0]), bit if bit >= 0 else int(self.random(1) * tokens.shape[1] * 16))
        return tokens


class NegativeZero(Fault):
    """Zeros have lost their sign: equal as numbers, not as bits."""

    name, stage = "negative-zero", Stage.COMBINE
    bug = "comparisons by value or tolerance: -0.0 equals 0.0 there, and a sum that began at -0.0 goes unseen"
    needs = "a token with a zero in it"

    def combined(self, tokens: Tensor) -> Tensor:
        """Make every zero of one token negative."""
        with_zeros = (tokens == 0).any(1).nonzero().flatten()
        if with_zeros.numel():
            row = tokens[with_zeros[self.pick(with_zeros.numel())]]
            row.masked_fill_(row == 0, -0.0)
        return tokens


class CorruptTokens(Fault):
    """Every token is wrong with a small probability, drawn again in each pass."""

    name, stage = "corrupt-tokens", Stage.COMBINE
    bug = "mori 475 (0.5 to 2 % of tokens), mori 610 (a rare residue that grows with repeats)"
    options = {"rate": real(0.02, 1e-9, 1.0)}
    needs = "enough tokens and repeats for its rate"

    def combined(self, tokens: Tensor) -> Tensor:
        """Flip the sign of a random column of each token that is hit."""
        struck = (self.random(tokens.shape[0]) < self.chosen["rate"]).nonzero().flatten()
        if struck.numel():
            self.hits += struck.numel()
            columns = (self.random(struck.numel()) * tokens.shape[1]).long()
            tokens.view(torch.int16)[struck, columns] ^= -0x8000
        return tokens


class DispatchedIds(Fault):
    """Combine is given the ids that dispatch returned instead of the rank's own."""

    name, stage = "dispatched-ids", Stage.COMBINE
    bug = "mori 475, 546, vllm 43068: dispatch's returned ids passed to combine, of the right shape"
    needs = "tokens of its rank that go to fewer than all ranks: three ranks or more"

    def received(self, dispatched: Dispatched) -> Dispatched:
        """Keep the ids."""
        self._ids = dispatched.ids[: int(dispatched.total_recv)].clone()
        return dispatched

    def returned(self, rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first of them, one per token."""
        if not len(self._ids):
            return rows, ids
        wrong = self._ids[torch.arange(len(ids), device=ids.device) % len(self._ids)]
        case = self.scene.case
        asked, sent = (destinations(one, case.experts_per_rank, case.ep_size) for one in (wrong, ids))
        self.hits += int((asked != sent).any(1).sum())  # ids of other experts of the same ranks request the same rows
        return rows, wrong


class NaNTail(Fault):
    """Combine reads rows past total_recv, which were never written."""

    name, stage = "nan-tail", Stage.COMBINE
    bug = "aiter 3677, vllm PR 53261: NaN of padding rows reaches real tokens"

    def returned(self, rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Read half of the rows from the tail, which holds NaN."""
        live = min(len(self.scene.sources()), len(rows))
        count = -(-live // 2)
        self.hits += count
        rows[:count] = float("nan")
        return rows, ids


class OutputReused(Fault):
    """The next phase overwrites the output before this rank has read it."""

    name, stage = "output-reused", Stage.COMBINE
    bug = "mori 93: output buffers reused across phases, a slow rank reads the next call's"

    def returned(self, rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the outgoing rows."""
        self._rows = rows[: len(self.scene.sources())].clone()
        return rows, ids

    def combined(self, tokens: Tensor) -> Tensor:
        """Write them over the first tokens."""
        count = min(len(self._rows), len(tokens) // 2)
        before = tokens[:count].clone()
        tokens[:count] = self._rows[:count]
        self.hits += int((before.view(torch.int16) != tokens[:count].view(torch.int16)).any(1).sum())
        return tokens


class LocalOnly(Fault):
    """Communication is skipped: only the experts of the token's own rank contribute."""

    name, stage = "communication-skipped", Stage.COMBINE
    bug = "vllm 37529: MoRI silently skipped, seven eighths of the contributions lost"
    needs = "tokens that go to other ranks"

    def returned(self, rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Keep this rank's own results for its own tokens."""
        sources = self.scene.sources()
        slots = (sources[: len(rows), 0] == self.scene.rank).nonzero().flatten()
        self._tokens, self._rows = sources[slots, 1], rows[slots].clone()
        return rows, ids

    def combined(self, tokens: Tensor) -> Tensor:
        """Return only those."""
        only = torch.zeros_like(tokens)
        only[self._tokens] = self._rows
        self.hits += int((only.view(torch.int16) != tokens.view(torch.int16)).any(1).sum())
        return tokens.copy_(only)


class ShareLost(Fault):
    """The contribution of this rank's experts does not arrive."""

    name, stage = "share-lost", Stage.COMBINE
    bug = "mori 507: with an odd number of blocks, rows are dropped on the way"

    def returned(self, rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Send zeros."""
        live = len(self.scene.sources())
        self.hits += live
        rows[:live] = 0
        return rows, ids


class ShareDoubled(Fault):
    """The contribution of this rank's experts counts twice."""

    name, stage = "share-doubled", Stage.COMBINE
    bug = "aiter 3997: an atomic add onto a buffer that holds the result already"

    def returned(self, rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Send doubled rows."""
        live = len(self.scene.sources())
        self.hits += live
        rows[:live] *= 2
        return rows, ids


class TimesEpSize(Fault):
    """The whole output is multiplied by the number of ranks."""

    name, stage = "times-ep-size", Stage.COMBINE
    bug = "sglang PR 34887: an all-reduce after combine multiplies the output by ep_size"

    def combined(self, tokens: Tensor) -> Tensor:
        """Multiply the tokens."""
        self.hits += len(tokens)
        return tokens.mul_(self.scene.case.ep_size)


class SaturatingCast(Fault):
    """Rows are cast to fp8 without a scale on their trip back."""

    name, stage = "saturating-cast", Stage.COMBINE
    bug = "mori 306, 311: fp8 direct-cast combine saturates and failed grade-school maths"
    needs = "rows with a number beyond e4m3's range"

    def returned(self, rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Clamp to e4m3's range, and round."""
        live = len(self.scene.sources())
        cast = saturated(rows[:live].float(), fp8_dtype(self.scene.case.fp8_format)).bfloat16()
        self.hits += int((cast != rows[:live]).any(1).sum())
        rows[:live] = cast
        return rows, ids


class SwappedTokens(Fault):
    """Two tokens have each other's result: sums and norms over the output stay the same."""

    name, stage = "swapped-tokens", Stage.COMBINE
    bug = "mori 475's class: right results for the wrong tokens, which norms do not see"

    def combined(self, tokens: Tensor) -> Tensor:
        """Exchange two tokens."""
        if len(tokens) > 1:
            first = self.pick(len(tokens))
            second = (first + 1) % len(tokens)
            tokens[[first, second]] = tokens[[second, first]].clone()
        return tokens
