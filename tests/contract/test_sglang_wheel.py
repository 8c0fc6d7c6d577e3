"""SGLang's receive bound as distbench computes it, against functions of two wheels; test_facts.py has more.

0.5.23 has the newest names and bound, 0.5.20 is the last with the older ones. The wheels are read, never imported:
importing SGLang needs most of its dependencies.
"""

from __future__ import annotations

import logging
import random
import sys
import zipfile
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from distbench.case.sglang_releases import (
    NEWEST,
    SGLANG_RULES,
)
from distbench.pipeline.recv_bound import recv_bound
from tests.cases import tiny_case
from tests.contract.wheels import lifted, sglang_wheel

MORI = "sglang/srt/layers/moe/token_dispatcher/moriep.py"
OLDER = "0.5.20"
RUNNER = "sglang/srt/layers/moe/moe_runner/aiter.py"
NEWER_RULES = next(reversed(SGLANG_RULES.values()))


@pytest.fixture(scope="module")
def wheel() -> Iterator[zipfile.ZipFile]:
    with sglang_wheel(NEWEST) as archive:
        yield archive


class _Parallel:
    """Parallel sizes that the wheel's bound reads: data-parallel attention on the expert-parallel ranks."""

    attn_cp_size = attn_tp_size = 1
    attn_tp_rank = 0

    def __init__(self, ranks: int, tp_size: int, rank: int) -> None:
        self.moe_ep_size = self.attn_dp_size = ranks
        self.tp_size, self.attn_dp_rank = tp_size or ranks, rank


def test_receive_bound_equals_the_wheels_for_any_tokens_and_metadata(wheel: zipfile.ZipFile) -> None:
    namespace: dict[str, Any] = {"Optional": Any, "MORI_MIN_LOGICAL_RECV_ROWS": 32, "MORI_LOGICAL_RECV_ROW_ALIGN": 32}
    constants = wheel.read(MORI).decode()
    for name in ("MORI_MIN_LOGICAL_RECV_ROWS", "MORI_LOGICAL_RECV_ROW_ALIGN"):
        assert f"\n{name} = {namespace[name]}\n" in constants
    lifted(wheel, MORI, ("round_logical_recv_rows", "mori_recv_bound"), namespace)
    draw = random.Random(17)
    for _ in range(200):
        ranks, tp_size = draw.randint(1, 8), draw.choice([0, 0, 0, 16])
        tokens = [draw.choice([0, 1, 7, 33, 64]) for _ in range(ranks)]
        told = draw.choice([tokens, [count + 1 for count in tokens], tokens[:-1], [-1] * ranks])
        case = tiny_case(
            ranks, tokens=tokens, limit="off", recv_bound=True, tp_size=tp_size, sender_rows=",".join(map(str, told))
        )
        if not case.sender_rows:
            continue
        caps = set()
        for rank in range(ranks):
            namespace["get_parallel"] = lambda rank=rank, ranks=ranks, tp_size=tp_size: _Parallel(ranks, tp_size, rank)
            bound = namespace["mori_recv_bound"](tokens[rank], tuple(told))
            cap = namespace["round_logical_recv_rows"](bound, False) if bound > 0 else 0
            caps.add(cap if 0 < cap < case.capacity else None)
        assert caps == {recv_bound(case).rows}, case


def test_receive_bound_of_the_older_release_equals_its_wheels(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = ModuleType("sglang.srt.layers.dp_attention")
    for name in ("sglang", "sglang.srt", "sglang.srt.layers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, attention.__name__, attention)
    namespace: dict[str, Any] = {
        "get_bool_env_var": lambda *_: True,
        "logger": logging.getLogger("sglang"),
        "_RECV_BOUND_LOGGED": {0},
        "_warn_recv_bound_unavailable": lambda: None,
    }
    with sglang_wheel(OLDER) as older:
        theirs = lifted(older, RUNNER, ("_mori_decode_recv_bound",), namespace)["_mori_decode_recv_bound"]
    draw = random.Random(18)
    for _ in range(200):
        ranks = draw.randint(1, 8)
        tokens = [draw.choice([0, 1, 7, 33, 64]) for _ in range(ranks)]
        told = draw.choice([tokens, [count + 1 for count in tokens], tokens[:-1] or tokens])
        attention.__dict__.update(get_dp_global_num_tokens=lambda told=told: told, get_is_extend_in_batch=lambda: False)
        namespace["get_parallel"] = lambda ranks=ranks: SimpleNamespace(moe_ep_size=ranks, tp_rank=1)
        named = {"sglang_version": OLDER, "sender_rows": ",".join(map(str, told))}
        case = tiny_case(ranks, tokens=tokens, limit="off", recv_bound=True, **named)
        assert (theirs(case.capacity, case.topk) or None) == recv_bound(case).rows, case
