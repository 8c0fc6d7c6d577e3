"""Records of any length reach rank 0 whole, also if ranks send different lengths."""

from __future__ import annotations

from unittest.mock import patch

import pytest

from distbench.case.spec import Case
from distbench.distributed.session import Session
from distbench.errors import Verdict
from distbench.pipeline.run_case import run_case
from distbench.verify import gather
from distbench.verify.records import Outcome
from tests.cases import tiny_case
from tests.ranks import on_ranks

UNEVEN = tiny_case(tokens=(0, 1, 64, 33))


def run_with_heads_of(session: Session, case: Case, record_bytes: int) -> Outcome | None:
    session.enter(case.ep_size)
    with patch.object(gather, "_RECORD_BYTES", record_bytes):
        return run_case(session, case)


@pytest.mark.parametrize("record_bytes", [8, 500, *range(2300, 2600, 50), 1 << 20])
def test_gathered_records_longer_or_shorter_than_their_heads_arrive_whole(record_bytes: int) -> None:
    outcome = on_ranks(4, run_with_heads_of, UNEVEN, record_bytes)[0]
    assert outcome.judgement.verdict is Verdict.PASS
    assert [record.tokens for record in outcome.gathered.observations] == [0, 1, 64, 33]
