"""Bundles of damaged runs on real ranks, without a launch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from distbench.case.entry import Entry
from distbench.case.spec import Case
from distbench.distributed.session import Session
from distbench.pipeline.recorder import Recorder
from distbench.pipeline.run_case import run_case
from distbench.report.bundle.layout import Recorded
from distbench.report.bundle.manifest import write_manifest
from distbench.report.bundle.write import write_parts
from distbench.report.document import build_report
from distbench.report.environment import capture_environment
from distbench.verify.records import Outcome
from tests.ranks import on_ranks


def run_recorded(
    session: Session, folder: Path, run: Callable[..., Outcome | None], case: Case, *arguments: Any
) -> tuple[Outcome, Recorded] | None:
    """Call `run`, which may inject damage, and write the parts of a bundle; return both results on rank 0."""
    recorder = Recorder()
    with patch(f"{run.__module__}.run_case", partial(run_case, recorder=recorder)):
        outcome = run(session, case, *arguments)
    recorded = write_parts(session, recorder, folder, outcome)
    return None if outcome is None or recorded is None else (outcome, recorded)


def run_healthy(session: Session, case: Case) -> Outcome | None:
    """Run `case` without damage."""
    return run_case(session, case)


def leave_bundle(folder: Path, run: Callable[..., Outcome | None], case: Case, *arguments: Any) -> Outcome:
    """Run `case` on its ranks and write a whole bundle into `folder`."""
    outcome, recorded = on_ranks(case.ep_size, run_recorded, folder, run, case, *arguments)[0]
    environment = capture_environment({}, ["here"], ["cpu"])
    report = build_report(Entry(name="run", case=case, sources={}), outcome, environment=environment, wall_s=0.0)
    write_manifest(folder, report, outcome, recorded)
    found: Outcome = outcome
    return found
