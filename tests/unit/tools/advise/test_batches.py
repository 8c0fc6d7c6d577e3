"""Tokens by step: distributions, tables and SGLang's logs, and refusals of what no step can have."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from distbench.errors import InvalidCase
from distbench.tools.advise.batches import Limits, Phase, Steps, full_steps, read_steps

LIMITS = Limits(3, (50, 50, 50), "--tokens")
ENTRIES = (
    '{"step": 7, "rank": 0, "tokens": 3}',
    '{"step": 7, "rank": 2, "tokens": 4}',
    '{"step": 9, "rank": 1, "tokens": 50}',
)
LOG = """\
[2025-11-03 14:31:10 DP0 TP0 EP0] Decode batch, #running-req: 7, #token: 432, token usage: 0.27, cuda graph: True
[2025-11-03 14:31:10 DP1 TP1 EP1] Decode batch, #running-req: 9, #token: 28, token usage: 1.00, cuda graph: True
[2025-11-03 14:31:10 DP2 TP2 EP2] Decode batch. #running-req: 1, #token: 28, token usage: 1.00, cuda graph: True
[2025-11-03 14:31:11] INFO:     127.0.0.1:48312 - "GET /get_model_info HTTP/1.1" 200 OK
[2025-11-03 14:31:11 DP0 TP0 EP0] Prefill batch, #new-seq: 2, #new-token: 40, #cached-token: 0, #running-req: 7
[2025-11-03 14:31:12 DP1 TP1 EP1] Decode batch, #running-req: 5, #token: 28, token usage: 1.00, cuda graph: True
"""


def read(text: str, count: int = 1000, phase: Phase = "decode", limits: Limits = LIMITS) -> Steps:
    return read_steps(text, limits, count, 1, phase)


def written(folder: Path, name: str, content: str) -> str:
    (folder / name).write_text(content)
    return str(folder / name)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "step,rank,tokens,more\n7,0,3,x\n7,2,4,x\n9,1,50,x\n\n"),
        ("a.jsonl", "\n\n".join(ENTRIES) + "\n"),
        ("a.json", f"[{', '.join(ENTRIES)}]"),
    ],
)
def test_table_of_entries_gives_the_size_of_each_step(tmp_path: Path, name: str, content: str) -> None:
    steps = read(written(tmp_path, name, content))
    assert (steps.names.tolist(), steps.totals.tolist(), steps.mosts.tolist()) == ([7, 9], [7, 50], [4, 50])


def test_json_of_lists_has_a_step_in_each(tmp_path: Path) -> None:
    steps = read(written(tmp_path, "a.json", "[[1, 2, 3], [4, 5, 6]]"))
    assert (steps.names.tolist(), steps.totals.tolist(), steps.mosts.tolist()) == ([0, 1], [6, 15], [3, 6])


def test_log_of_sglang_has_the_nth_line_of_each_rank_in_step_n(tmp_path: Path) -> None:
    steps = read(written(tmp_path, "server.log", LOG))
    assert (steps.totals.tolist(), steps.mosts.tolist()) == ([17, 3 * 5], [9, 5])
    assert "in 1 of them ranks without a line counted as the fullest one" in steps.text
    prefill = read(written(tmp_path, "server.log", LOG), phase="prefill")
    assert prefill.totals.tolist() == [120]


def test_log_with_numbered_batches_uses_their_numbers(tmp_path: Path) -> None:
    text = LOG.replace("DP0 TP0 EP0] Decode batch,", "DP0 TP0 EP0] Decode batch [30],")
    assert read(written(tmp_path, "a.log", text)).names.tolist() == [0, 1, 30]


def test_distributions_are_seeded_and_within_their_bounds() -> None:
    steps = read("uniform:2-5")
    assert (steps.totals >= 6).all()
    assert (steps.mosts <= 5).all()
    assert abs(steps.totals.mean() - 10.5) < 0.3
    assert read("uniform:2-5").totals.tolist() == steps.totals.tolist()
    cut = read("poisson:49.5")
    assert cut.mosts.max() == 50
    assert len(read("poisson:3", count=7).totals) == 7


def test_full_steps_have_all_tokens() -> None:
    steps = full_steps((4, 9), 3)
    assert (steps.totals.tolist(), steps.mosts.tolist()) == ([13] * 3, [9] * 3)


def test_more_than_256_sizes_are_rounded_up() -> None:
    totals = np.arange(1, 1001)
    batches, place = Steps(totals, totals, totals, "").batches()
    assert len(batches) == 256
    sizes = np.array([batch.total for batch in batches])[place]
    assert (sizes >= totals).all()
    assert (sizes - totals).max() <= 4
    assert sum(batch.share for batch in batches) == pytest.approx(1)
    assert all(batch.most == batch.total for batch in batches)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("uniform:9-2", "allowed are uniform:LOW-HIGH"),
        ("normal:3", "allowed are uniform:LOW-HIGH"),
        ("uniform:0-51", r"51 tokens, and a rank has at most 50 \(--tokens\)"),
        ("none.csv", "cannot be read .No such file"),
        ("/dev/null.csv", "cannot be read"),
    ],
)
def test_text_that_names_no_batches_is_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidCase, match=message):
        read(text)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "step,rank\n1,2\n", "no column tokens"),
        ("a.csv", "", "no column step, rank, tokens"),
        ("a.csv", "step,rank,tokens\n", "no step in it"),
        ("a.csv", "step,rank,tokens\n1,3,1\n", "rank 3 of 3 ranks; give --ep-size"),
        ("a.csv", "step,rank,tokens\n1,1,51\n", "rank 1 has 51 tokens, above --tokens = 50; raise it"),
        ("a.csv", "step,rank,tokens\n1,1,-1\n", "tokens = -1; allowed are whole numbers"),
        ("a.csv", "step,rank,tokens\n1,1\n", "tokens = -1"),
        ("a.csv", "step,rank,tokens\n1,1,x\n", "cannot be read"),
        ("a.csv", "step,rank,tokens\n1,1,1\n1,1,1\n", "step 1 has rank 1 twice"),
        ("a.csv", "x" * 100_000, "a line of more than 65536 bytes"),
        ("a.json", "{}", "not a list"),
        ("a.json", "[3]", "3 has no step, rank and tokens"),
        ("a.json", "[[1.5]]", "tokens = 1.5"),
        ("a.json", "[" * 10_000, "cannot be read"),
        ("a.jsonl", "{", "cannot be read"),
        ("a.log", "nothing here\n", "no step in it"),
    ],
)
def test_file_that_no_step_can_have_is_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(InvalidCase, match=message) as refused:
        read(written(tmp_path, name, content))
    assert "\n" not in str(refused.value)


def test_file_that_is_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, "a.json", json.dumps([[1, 1]] * 9))
    monkeypatch.setattr("distbench.tools.advise.batches._MOST_STEPS", 8)
    with pytest.raises(InvalidCase, match="more than 8 steps"):
        read(path)
    monkeypatch.setattr("distbench.tools.advise.batches._MOST_JSON", 8)
    with pytest.raises(InvalidCase, match=r"give .jsonl or .csv"):
        read(path)
