"""The process of one rank, however it was started, from joining the group to its exit code."""

from __future__ import annotations

import os
import sys
import time
import traceback
from contextlib import closing
from pathlib import Path

import msgspec

from distbench.breadcrumbs import Breadcrumbs
from distbench.errors import Verdict
from distbench.job import Job, RankFailure, crumb_path, describe_failure, failure_path
from distbench.rank import run_case
from distbench.session import Session
from distbench.verify.records import Outcome

_PEER_GRACE_S = 10.0


def work(job: Job) -> int:
    """Run the job's case as the rank that torchrun's variables name; return the exit code. Collective."""
    out = Path(job.out)
    crumb_path(out, 0).parent.mkdir(parents=True, exist_ok=True)
    with closing(Breadcrumbs(crumb_path(out, int(os.environ["RANK"])))) as crumbs:
        session = Session(crumbs, job.case.timeout)
        try:
            outcome = run_case(session, job.case)
            exit_code = session.announce(outcome.judgement.verdict.exit_code if outcome else 0)
            if session.rank == 0 and outcome is not None:
                _report(job, outcome)
            crumbs.mark("done")
        except Exception as error:  # noqa: BLE001 - whatever ends this rank has to end all of them, and be named
            _fail(session, job, error)
        session.close()
    return 0 if job.supervised else exit_code


def _report(job: Job, outcome: Outcome) -> None:
    from distbench.report.document import build_report  # noqa: PLC0415 - paid by rank 0 alone
    from distbench.report.environment import capture_environment  # noqa: PLC0415
    from distbench.report.files import write_report  # noqa: PLC0415

    records = outcome.gathered.observations if outcome.gathered else []
    environment = capture_environment(os.environ, [one.host for one in records], [one.device for one in records])
    wall_s = (time.monotonic_ns() - job.started_ns) / 1e9
    report = build_report(outcome, sources=job.sources, warnings=job.warnings, environment=environment, wall_s=wall_s)
    for path in filter(None, (str(Path(job.out) / "report.json"), job.json_path)):
        write_report(Path(path), report)
    if not job.supervised:
        from distbench.report.console import print_report  # noqa: PLC0415

        print_report(report)


def _fail(session: Session, job: Job, error: Exception) -> None:
    """Leave at once. The first rank to fail says why; the others fail only because it left, and say nothing."""
    position = session.crumbs.position()
    if session.claim_failure():
        failure = RankFailure(
            rank=session.rank,
            exception=type(error).__name__,
            message=" ".join(str(error).split()),
            position=position,
            traceback=traceback.format_exc(),
        )
        failure_path(Path(job.out)).write_bytes(msgspec.json.encode(failure))
        if not job.supervised:
            sys.stderr.write(f"distbench: {Verdict.RANK_FAULT.value}: {describe_failure(failure)}\n")
    else:
        time.sleep(_PEER_GRACE_S)
    sys.stderr.flush()
    os._exit(Verdict.RANK_FAULT.exit_code)
