"""States and figures of the stages of ep8.sh as Markdown, for docs/measurements/."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

# Lines of a log that hold a figure against its bound, or a share or time of it, as the scripts print them.
_FIGURES = ("at most", "bound of", ", ratio ", "median", "all-to-all")


class Stage(NamedTuple):
    """A stage: its folder, its state, its seconds, its exit code and what it is."""

    folder: Path
    state: str
    seconds: int
    code: int
    text: str


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of ep8.sh")
    folder = parser.parse_args().folder
    stages = _stages(folder)
    if (folder / "trial").exists():
        print("A trial on the CPU with tiny shapes: no time means anything, and parts are emulated.\n")
    print("| stage | state | seconds | result |\n|---|---|---|---|")
    for stage in stages:
        print(f"| {stage.folder.name} | {stage.state} | {stage.seconds} | {_escaped(_result(stage))} |")
    for stage in stages:
        lines = _details(stage)
        if lines:
            print(f"\n## {stage.folder.name}: {stage.text}\n")
            print("\n".join(lines))


def _stages(folder: Path) -> list[Stage]:
    """Stages that ran, in the order in which they ended."""
    found = sorted(folder.glob("*/state"), key=lambda path: path.stat().st_mtime_ns)
    return [_stage(path) for path in found]


def _stage(path: Path) -> Stage:
    state, seconds, code, text = path.read_text().strip().split(" ", 3)
    return Stage(path.parent, state, int(seconds), int(code), text)


def _result(stage: Stage) -> str:
    """Verdicts of a stage with results, or the number of bounds held, else the last line of its log."""
    cases = _cases(stage)
    if cases:
        counts = Counter(case["verdict"] for case in cases)
        expected = sum(bool(case["as_expected"]) for case in cases)
        verdicts = ", ".join(f"{count} {name}" for name, count in counts.items())
        return f"{verdicts}; {expected} of {len(cases)} as expected"
    lines = _log(stage)
    held, missed = (sum(mark in line for line in lines) for mark in (": ok", "MISSED"))
    if held or missed:
        return f"{held} of {held + missed} bounds held"
    return lines[-1] if lines else ""


def _details(stage: Stage) -> list[str]:
    """A table of the cases of a suite of the layer, else the lines of the log that hold figures."""
    cases = _cases(stage)
    if cases and stage.folder.name.startswith("cases-"):
        rows = [f"| {_escaped(case['name'])} | {case['verdict']} | {_errors(case)} |" for case in cases]
        return ["| case | verdict | errors of ideal |", "|---|---|---|", *rows]
    lines = [line for line in _log(stage) if any(word in line for word in _FIGURES)]
    return ["```", *lines, "```"] if lines and not cases else []


def _errors(case: dict[str, Any]) -> str:
    """Least and largest ratio of errors to ideal ones over arms, stages and ranks."""
    ratios = [bound for one in case.get("errors") or [] for bound in (one.get("ratio") or ())]
    return f"{min(ratios):.3f} to {max(ratios):.3f}" if ratios else ""


def _cases(stage: Stage) -> list[dict[str, Any]]:
    path = stage.folder / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _log(stage: Stage) -> list[str]:
    path = stage.folder / "log"
    return [line.rstrip() for line in path.read_text(errors="replace").splitlines() if line.strip()]


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    main()
