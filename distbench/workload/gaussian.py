"""Realistic inputs: nearly normal values (Irwin-Hall: the sum of four random bytes), bit-identical on every device.

The sum of four bytes minus 510 has 9 bits and a sign. Times a scale of 8 significant bits it is exact in float32, so
the cast to bf16 is the only rounding.

Drawing each weight would cost too much. For each of w1 and w2 a pool of 2**14 values and one of 2**18 signs are drawn,
the same for all seeds. A row takes consecutive values and signs, one of each for a column, from two places that a
permutation of 32 bits, keyed by the seed, makes of the row's number. No two rows share both places, so rows of
different experts differ. The terms of a product of two rows have independent signs, so rows are no more correlated than
if each value had been drawn (tests/unit/workload/test_gaussian.py).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from distbench.workload.bits import permuted, positive_words, words
from distbench.workload.chunking import rows_at_a_time

ROUTED_SCALING_FACTOR = 2.5
"""DeepSeek-V3's `routed_scaling_factor`."""

_DEVIATION = math.sqrt(4 * (256**2 - 1) / 12)
_CENTRE = 510
_SCALE_BITS = 8
_CHUNK_ELEMENTS = 1 << 20
_WEIGHT_BITS = 20
_LOW_BYTES = 0x00FF_00FF
_POOL_BITS = 14
_POOL_VALUES, _POOL_SIGNS = 1 << _POOL_BITS, 1 << (32 - _POOL_BITS)
_SIGN = -(1 << 15)
_POOL_SEED = 0


def hidden_states(seed: int, keys: Tensor, hidden_size: int) -> Tensor:
    """Return the rows of the tokens with keys int64 [n] (`token_keys`): bf16 [n, H], about N(0, 1)."""
    return _normal(seed, "gaussian/hidden", keys, hidden_size, 1)


def routing_weights(seed: int, keys: Tensor, topk: int, shared: int = 0) -> Tensor:
    """Return the weights of the tokens with keys int64 [n]: float32 [n, k + N], above 0.

    The first k sum to 1 within k ulp, an ulp being 2**-20: weights are integer multiples of it, so every device rounds
    them alike. Those of the N shared slots are 1 over the model's factor for routed experts, by which the layer's
    output is multiplied later, as in SGLang 0.5.23 (`fused_shared_expert_weight`).
    """
    shares = (positive_words(seed, "gaussian/weights", keys, topk, keys.device) >> 20) + 512
    routed = ((shares << _WEIGHT_BITS) // shares.sum(1, keepdim=True)).float() * 2.0**-_WEIGHT_BITS
    return pad(routed, (0, shared), value=1 / ROUTED_SCALING_FACTOR) if shared else routed


def dense_weights(hidden_size: int, intermediate_size: int, seed: int, experts: Tensor) -> tuple[Tensor, Tensor]:
    """Return w1 bf16 [e, 2I, H], about N(0, 1/H), and w2 bf16 [e, H, I], about N(0, 1/I), of `experts` int64 [e]."""
    count, inter = experts.numel(), intermediate_size
    w1 = _from_pool(seed, "gaussian/w1", _rows_of(experts, 2 * inter), hidden_size)
    w2 = _from_pool(seed, "gaussian/w2", _rows_of(experts, hidden_size), inter)
    return w1.view(count, 2 * inter, hidden_size), w2.view(count, hidden_size, inter)


def biases(hidden_size: int, intermediate_size: int, seed: int, experts: Tensor) -> tuple[Tensor, Tensor]:
    """Return bias1 [e, 2I] and bias2 [e, H] of `experts` int64 [e]: float32 of 17 significant bits, about N(0, 1/4)."""
    return (
        _sums(seed, "gaussian/bias1", experts, 2 * intermediate_size) * _short_scale(0.5 / _DEVIATION),
        _sums(seed, "gaussian/bias2", experts, hidden_size) * _short_scale(0.5 / _DEVIATION),
    )


def _rows_of(experts: Tensor, rows: int) -> Tensor:
    return (experts.unsqueeze(1) * rows + torch.arange(rows, device=experts.device)).flatten()


def _from_pool(seed: int, stream: str, rows: Tensor, columns: int) -> Tensor:
    """Return the weights of the rows with numbers int64 [n]: bf16 [n, columns], about N(0, 1/columns)."""
    values, signs = _pool(stream, columns, rows.device)
    places = permuted(seed, f"{stream}/places", rows).long()
    first, second = places & (_POOL_VALUES - 1), (places >> _POOL_BITS) & (_POOL_SIGNS - 1)
    made = torch.empty(rows.numel(), columns, dtype=torch.int16, device=rows.device)
    step = rows_at_a_time(_CHUNK_ELEMENTS, columns, rows.device)
    for start in range(0, rows.numel(), step):
        part = slice(start, start + step)
        torch.index_select(values, 0, first[part], out=made[part])
        made[part].bitwise_xor_(signs.index_select(0, second[part]))
    return made.view(torch.bfloat16)


@lru_cache(maxsize=2)
def _pool(stream: str, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the pools of a stream, int16 [places, columns]: bits of bf16 values, and sign bits.

    They are kept for the cases of one shape, of which a suite has many.
    """
    first = torch.arange(1, device=device)
    values = _normal(_POOL_SEED, stream, first, _POOL_VALUES + columns - 1, columns).view(torch.int16)
    count = _POOL_SIGNS + columns - 1
    drawn = words(_POOL_SEED, f"{stream}/signs", first, -(-count // 16), device).view(torch.int16)
    bits = drawn.unsqueeze(2) << torch.arange(8, dtype=torch.int16, device=device)
    signs = (bits & _SIGN).flatten()[:count]
    return values.flatten().unfold(0, columns, 1), signs.unfold(0, columns, 1)


def _normal(seed: int, stream: str, rows: Tensor, columns: int, fan_in: int) -> Tensor:
    values = torch.empty(rows.numel(), columns, dtype=torch.bfloat16, device=rows.device)
    scale = _short_scale(1 / (_DEVIATION * math.sqrt(fan_in)))
    step = rows_at_a_time(_CHUNK_ELEMENTS, columns, rows.device)
    for start in range(0, rows.numel(), step):
        values[start : start + step] = _sums(seed, stream, rows[start : start + step], columns) * scale
    return values


def _sums(seed: int, stream: str, rows: Tensor, columns: int) -> Tensor:
    """Return sums of four random bytes about 0, float32 [n, columns]."""
    bits = words(seed, stream, rows, columns, rows.device)
    pairs = (bits & _LOW_BYTES) + ((bits >> 8) & _LOW_BYTES)
    return ((pairs & 0xFFFF) + (pairs >> 16) - _CENTRE).float()


def _short_scale(value: float) -> float:
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(mantissa * (1 << _SCALE_BITS)), exponent - _SCALE_BITS)
