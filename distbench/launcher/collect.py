"""Verdicts after the fact, from the files that the ranks of a plain torchrun left behind."""

from __future__ import annotations

from pathlib import Path

import msgspec

from distbench.case.stages import Stage
from distbench.errors import Busy, InvalidCase
from distbench.launcher.campaign import Campaign, Rules
from distbench.launcher.job import Job, job_path
from distbench.launcher.locks import hold
from distbench.launcher.postmortem import explain_fault, positions
from distbench.report.journal import Summary
from distbench.report.progress import Progress
from distbench.utils.process import is_alive
from distbench.utils.text import one_line


def collect(out: Path, lock_timeout_s: float = 0.0) -> Summary:
    """Write the verdict of the case in flight, and summary.json. Cases that never began stay open.

    Raises:
        InvalidCase: `out` holds no job, or one whose supervisor has written its verdicts.
        Busy: a bench holds the folder, or its ranks are still running on this machine.
        LaunchFailed: none of the job's ranks had begun.

    """
    if not job_path(out).exists():
        message = f"{job_path(out)}: no such file; give the --out folder of a run"
        raise InvalidCase(message)
    with hold(out, (), lock_timeout_s):
        return _collect(out)


def _collect(out: Path) -> Summary:
    try:
        job = msgspec.json.decode(job_path(out).read_bytes(), type=Job)
    except (OSError, msgspec.DecodeError) as error:
        message = f"{job_path(out)}: {one_line(error)}; give the --out folder of a run"
        raise InvalidCase(message) from error
    if job.supervised:
        message = f"{out}: its verdicts are complete, since distbench started its ranks; resume with the same command"
        raise InvalidCase(message)
    job = msgspec.structs.replace(job, out=str(out))  # the folder may have moved, and a path may be relative
    seen = positions(job)
    running = [rank for rank, at in seen.items() if at.stage_name != Stage.DONE and is_alive(at.pid)]
    if running:
        message = f"rank {', '.join(map(str, running))} of {out} still runs; collect when the job has ended"
        raise Busy(message)
    campaign = Campaign(job.entries, out, Rules(), Progress(len(job.entries), quiet=True), job.bundle)
    ended = len(seen) == job.num_ranks and all(at.stage_name == Stage.DONE for at in seen.values())
    return campaign.conclude(None if ended else explain_fault(job, None))
