"""All results as one JSON document: the summary, and each report as its journal has it."""

from __future__ import annotations

from collections import Counter
from typing import BinaryIO

import msgspec

from distbench.report.results import Results

SCHEMA = "distbench.results/1"


def write(results: Results, file: BinaryIO) -> None:
    """Write `{schema, results: […], verdicts, missing, exit_code}`."""
    verdicts: Counter[str] = Counter()
    file.write(b'{"schema":%b,"results":[' % msgspec.json.encode(SCHEMA))
    for number, (raw, result) in enumerate(results.lines()):
        file.write((b",\n" if number else b"\n") + raw)
        verdicts[result.verdict.value] += 1
    totals = {"verdicts": dict(verdicts), "missing": results.missing, "exit_code": results.exit_code}
    file.write(b"\n]," + msgspec.json.encode(totals)[1:] + b"\n")
