"""SGLang's receive bound: by release, and each case in which production keeps the whole receive buffer."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from distbench.case.limits import Traffic
from distbench.errors import InvalidCase, Unsupported
from distbench.launcher.preflight import check_case
from distbench.pipeline.production_rows import production_rows
from distbench.pipeline.recv_bound import limit_rows, recv_bound
from distbench.verify.records import ResolvedCase
from tests.cases import tiny_case


def case(**values: Any) -> Any:
    defaults = {"tokens": 16, "limit": "off", "recv_bound": True, "transport": "mori", "emulate": True}
    return tiny_case(4, **(defaults | {"max_dispatch_tokens_per_rank": 512} | values))


@pytest.mark.parametrize(
    ("values", "rows", "reason"),
    [
        ({}, 64, ""),
        ({"tokens": [5, 7, 0, 0]}, 32, ""),
        ({"tokens": [20, 33, 7, 9]}, 96, ""),
        ({"mori_kernel": "AsyncLL"}, 64, ""),
        ({"mori_kernel": "AsyncLL", "gpu_per_node": 2}, 64, ""),
        ({"gpu_per_node": 2}, None, "InterNodeV1 is none of IntraNode and AsyncLL"),
        ({"gpu_per_node": 2, "max_dispatch_tokens_per_rank": 64}, None, "InterNodeV1LL is none of"),
        ({"mori_kernel": "IntraNodeLL"}, None, "IntraNodeLL is none of"),
        ({"two_batch_overlap": True}, None, "not with two-batch overlap"),
        ({"tp_size": 8}, None, "tp_size 8 with 4 ranks"),
        ({"tp_size": 4}, 64, ""),
        ({"sender_rows": "16,16,16,16"}, 64, ""),
        ({"sender_rows": "9,9,9,9"}, None, "the metadata is not of this batch"),
        ({"sender_rows": "16,16"}, None, "the metadata has 2 senders"),
        ({"sender_rows": "16,16,16,-1"}, None, "negative ones among them"),
        ({"tokens": 0}, None, "a bound of 0 rows is ignored for a buffer"),
        ({"max_dispatch_tokens_per_rank": 16}, None, "a bound of 64 rows is ignored for a buffer of 64"),
        ({"transport": "collective"}, 64, ""),
        ({"transport": "collective", "gpu_per_node": 2}, None, "InterNodeV1 is none of"),
        ({"sglang_version": "0.5.22"}, 64, ""),
        ({"sglang_version": "0.5.21"}, 16 * 4 * 4, ""),
        ({"sglang_version": "0.5.19", "gpu_per_node": 2}, 16 * 4 * 4, ""),
        ({"sglang_version": "0.5.19", "two_batch_overlap": True, "tp_size": 8}, 16 * 4 * 4, ""),
        ({"sglang_version": "0.5.20", "sender_rows": "1,2,3,4"}, 40, ""),
        ({"sglang_version": "0.5.20", "sender_rows": "16,16"}, None, "the metadata has 2 of 4 senders"),
        ({"sglang_version": "0.5.20", "max_dispatch_tokens_per_rank": 64}, None, "a bound of 256 rows is ignored"),
        ({"sglang_version": "0.5.18"}, None, "SGLang 0.5.18 has none (0.5.19 and later)"),
    ],
)
def test_receive_bound_follows_the_sglang_release(values: dict[str, Any], rows: int | None, reason: str) -> None:
    bound = recv_bound(case(**values))
    assert bound.rows == rows
    assert reason in bound.reason
    assert bool(reason) == bool(bound.reason)


def test_receive_bound_is_off_if_ranks_exceed_one_node() -> None:
    values = {"transport": "collective", "emulate": False, "limit": "off", "recv_bound": True}
    assert recv_bound(tiny_case(8, **values)).rows == 128
    assert recv_bound(tiny_case(16, **values)).rows is None
    assert recv_bound(tiny_case(8, **values), local_ranks=4).rows is None


def test_metadata_that_is_stale_on_some_ranks_is_unsupported() -> None:
    with pytest.raises(Unsupported, match="stale on 1 of 4 ranks, the first is rank 1"):
        recv_bound(case(sender_rows="16,9,16,16"))
    with pytest.raises(InvalidCase, match="give whole numbers joined by commas"):
        recv_bound(case(sender_rows="many"))


@pytest.mark.parametrize(
    ("values", "rows"),
    [
        ({}, [64] * 4),
        ({"limit": "40"}, [40] * 4),
        ({"limit": "4000"}, [2048] * 4),
        ({"sender_rows": "16,9,16,16"}, [64, 2048, 64, 64]),
        ({"sender_rows": "16,60,16,16"}, [128, 2048, 128, 128]),
        ({"sender_rows": "9,9,9,9"}, [2048] * 4),
        ({"sender_rows": "16,16,16,-1"}, [2048] * 4),
        ({"sender_rows": "16,16"}, [2048] * 4),
        ({"tp_size": 8}, [2048] * 4),
        ({"tokens": 0}, [2048] * 4),
        ({"recv_bound": False}, [2048] * 4),
    ],
)
def test_rows_of_a_caller_follow_each_ranks_own_metadata(values: dict[str, Any], rows: list[int]) -> None:
    called = msgspec.structs.replace(case(**values), caller="sglang")
    traffic = Traffic(called.tokens, (0,) * 4, called.capacity)
    resolved = ResolvedCase(called, traffic, limit_rows(called, traffic))
    assert [production_rows(resolved, rank) for rank in range(4)] == rows


def test_metadata_that_is_stale_on_some_ranks_is_a_callers_own_matter() -> None:
    bound = recv_bound(msgspec.structs.replace(case(sender_rows="16,9,16,16"), caller="sglang"))
    assert bound.rows is None
    assert "stale on 1 of 4 ranks, and the caller cuts on the others alone" in bound.reason


def test_reason_for_an_unbounded_receive_buffer_is_reported() -> None:
    assert check_case(case(gpu_per_node=2))[0] == (
        "recv_bound: nothing is cut, as in production: SGLang 0.5.23: InterNodeV1 is none of IntraNode and AsyncLL"
    )
    assert "in decode batches only" in check_case(case(sglang_version="0.5.20"))[0]
    assert check_case(case()) == ()
    assert check_case(case(limit="sum32", gpu_per_node=2)) == ()
    (inert,) = check_case(case(recv_bound=False, tp_size=8, sender_rows="9,7"))
    assert inert.startswith("tp_size, sender_rows: used by recv_bound")
    with pytest.raises(InvalidCase, match=r"sglang_version = '0\.4\.0'"):
        check_case(case(recv_bound=False, sglang_version="0.4.0"))
