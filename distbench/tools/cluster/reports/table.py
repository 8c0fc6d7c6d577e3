"""CSV: one row per group."""

from __future__ import annotations

import csv
import io
from typing import BinaryIO

from distbench.report.export.table import cell
from distbench.tools.cluster.validation import Validation

COLUMNS = ("step", "nodes", "verdict", "exit_code", "wall_s", "reason")


def write(validation: Validation, file: BinaryIO) -> None:
    """Write the header and a row for each group, its nodes joined by spaces."""
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    rows = csv.writer(text)
    rows.writerow(COLUMNS)
    for trial in validation.trials:
        row = (trial.step, " ".join(trial.nodes), trial.verdict, trial.exit_code, round(trial.wall_s, 3), trial.reason)
        rows.writerow(map(cell, row))
    text.flush()
    text.detach()
