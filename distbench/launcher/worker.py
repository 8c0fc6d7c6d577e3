"""The process of one rank, however it was started, from joining the group to its exit code."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

import msgspec

from distbench.case.entry import Entry
from distbench.case.identity import case_hash
from distbench.case.spec import Case
from distbench.case.stages import Stage
from distbench.distributed.flight_recorder import START_EVENTS
from distbench.distributed.heartbeat import Heartbeat
from distbench.distributed.session import Session
from distbench.errors import OUT_OF_TIME, Verdict, is_disk_full, worst_exit_code
from distbench.launcher.job import (
    Job,
    Machine,
    RankFailure,
    done_path,
    failure_path,
    heartbeat_path,
    job_path,
    machine_path,
    next_job_path,
    ranks_folder,
    stack_path,
)
from distbench.launcher.stacks import answer_with_stacks
from distbench.launcher.time_budget import Deadline, Pace
from distbench.pipeline.recorder import Recorder
from distbench.pipeline.run_case import run_case
from distbench.report.files import write_atomically
from distbench.report.schema import Report
from distbench.report.sink import Sink
from distbench.utils.process import die_with_parent
from distbench.utils.text import printable
from distbench.verify.records import Outcome

_PEER_GRACE_S = 10.0
# Poll interval of a rank without a job, and its heartbeat interval, which keeps it from counting as hung.
_POLL_S = 0.005
_IDLE_S = 0.5
# Messages of gloo and NCCL when a peer is gone; torch has no exception type for it.
_LOST_PEER = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "socket closed",
    "no route to host",
)
# Timeout messages of collectives and of the rendezvous store.
_TIMED_OUT = ("timed out", "wait timeout")


def work(job: Job) -> int:
    """Run the job's cases as the rank that torchrun's variables name; return the exit code. Collective."""
    out, rank = Path(job.out), int(os.environ["RANK"])
    ranks_folder(out).mkdir(parents=True, exist_ok=True)
    failure_path(out, rank).unlink(missing_ok=True)
    if job.supervised:
        _die_with_supervisor()
    answer_with_stacks(stack_path(out, rank))
    with contextlib.closing(Heartbeat(heartbeat_path(out, rank))) as heartbeat:
        try:
            if rank == 0:
                write_atomically(job_path(out), msgspec.json.encode(job))
            return _run_jobs(job, heartbeat)
        except Exception as error:  # noqa: BLE001 - whatever ends this rank has to end all of them, and be named
            _fail(job, rank, heartbeat, error)


def _run_jobs(job: Job, heartbeat: Heartbeat) -> int:
    """Run the job and, where its ranks stay up, the following ones."""
    if job.accelerated and not any(entry.case.iterations for entry in job.entries):  # timing would include them
        os.environ.setdefault(START_EVENTS, "1")
    session = Session(heartbeat, _group_timeout(job), accelerated=job.accelerated, shares=job.shares_devices)
    machine = Machine(socket.gethostname(), str(session.own_device))
    machine_path(Path(job.out), session.rank).write_bytes(msgspec.json.encode(machine))
    exit_code = _run_entries(job, session, heartbeat)
    heartbeat.mark(Stage.DONE)
    number = 0
    while job.stays:
        session.meet()
        if session.rank == 0:
            done_path(Path(job.out), number).touch()
        number += 1
        job = _next_job(next_job_path(Path(job.out), number), heartbeat)
        _run_entries(job, session, heartbeat)
        heartbeat.mark(Stage.DONE)
    session.close()
    return exit_code


def _next_job(path: Path, heartbeat: Heartbeat) -> Job:
    """Wait for the next job; the heartbeat meanwhile says that the rank has none."""
    heartbeat.case_index = 0
    said = 0.0
    while not path.exists():
        if time.monotonic() - said > _IDLE_S:
            heartbeat.mark(Stage.DONE)
            said = time.monotonic()
        time.sleep(_POLL_S)
    return msgspec.json.decode(path.read_bytes(), type=Job)


def _sink(job: Job) -> Sink:
    return Sink(Path(job.out), job.entries, job.report_paths, prints=not job.supervised and not job.quiet)


def _run_entries(job: Job, session: Session, heartbeat: Heartbeat) -> int:
    sink = _sink(job) if session.rank == 0 else None
    pace = Pace(job.pace)
    left_out = False
    for index in _unfinished(job, session, sink):
        entry = job.entries[index]
        heartbeat.case_index = index
        started_ns = time.monotonic_ns()
        if session.enter(entry.case.ep_size):
            if job.deadline is not None and not _in_time(session, pace, entry.case, job.deadline):
                left_out = True
                continue
            recorder = Recorder() if job.bundle else None
            outcome = run_case(session, entry.case, recorder)
            heartbeat.mark(Stage.REPORT)
            wall_s = (time.monotonic_ns() - started_ns) / 1e9
            pace.note(entry.case, wall_s)
            report = sink.put(entry, outcome, wall_s) if sink is not None and outcome is not None else None
            if recorder is not None:
                _bundle(session, job, entry, recorder, report, outcome)
    heartbeat.case_index = len(job.entries)
    session.enter(session.world_size)
    codes = [*(sink.codes.values() if sink else ()), *([OUT_OF_TIME] if left_out else ())]
    exit_code = 0 if job.supervised else session.announce(worst_exit_code(codes))
    if sink is not None:
        sink.close()
    return exit_code


def _in_time(session: Session, pace: Pace, case: Case, deadline: Deadline) -> bool:
    """Whether rank 0 expects the case to end by the deadline, on every rank. Collective, in the case's group."""
    return not session.on_any_rank(value=session.rank == 0 and not pace.fits(case, deadline))


def _bundle(  # noqa: PLR0913 - the job, the case and its records
    session: Session, job: Job, entry: Entry, recorder: Recorder, report: Report | None, outcome: Outcome | None
) -> None:
    """Write a bundle if the case failed, which only rank 0 knows from its report. Collective, in the group."""
    from distbench.report.bundle.layout import bundle_folder  # noqa: PLC0415 - only where a bundle is asked for
    from distbench.report.bundle.manifest import without_a_bundle, write_manifest  # noqa: PLC0415
    from distbench.report.bundle.write import write_parts  # noqa: PLC0415

    folder = bundle_folder(job.bundle, entry.case)
    failed = outcome if report is not None and job.failed(report.exit_code, as_expected=report.as_expected) else None
    recorded = write_parts(session, recorder, folder, failed)
    if failed is not None and report is not None and recorded is not None:
        with without_a_bundle(entry.name):
            write_manifest(folder, report, failed, recorded)


def _unfinished(job: Job, session: Session, sink: Sink | None) -> list[int]:
    """Numbers of the cases that rank 0's journal does not hold, on every rank. Collective."""
    finished = [sink is not None and case_hash(entry.case) in sink.codes for entry in job.entries]
    return [index for index, done in enumerate(session.share(finished)) if not done]


def _group_timeout(job: Job) -> float:
    """Seconds until a collective gives up; under supervision the supervisor decides, and earlier."""
    return job.longest_stage_s * 2 + 60 if job.supervised else job.longest_stage_s


def _reports(heartbeat: Heartbeat) -> bool:
    """Whether the rank was about to write a result."""
    return heartbeat.position().stage_name == Stage.REPORT


def _die_with_supervisor() -> None:
    """Make sure that no rank outlives the supervisor, even one that was killed (preload.py)."""
    die_with_parent()
    supervisor = multiprocessing.parent_process()
    if supervisor is not None and not supervisor.is_alive():
        os._exit(Verdict.RANK_FAULT.exit_code)


def _fail(job: Job, rank: int, heartbeat: Heartbeat, error: Exception) -> NoReturn:
    """Write the failure file of this rank and exit; a rank that only lost its peer waits for that peer to be found."""
    failure = RankFailure(
        rank=rank,
        exception=type(error).__name__,
        message=" ".join(str(error).split()),
        position=heartbeat.position(),
        traceback=traceback.format_exc(),
        echo=any(words in str(error).lower() for words in _LOST_PEER),
        timeout=any(words in str(error).lower() for words in _TIMED_OUT),
        disk_full=is_disk_full(error),
        results_lost=isinstance(error, OSError) and error.filename is not None and _reports(heartbeat),
    )
    with contextlib.suppress(OSError):
        failure_path(Path(job.out), rank).write_bytes(msgspec.json.encode(failure))
    if not job.supervised and not failure.echo:
        sys.stderr.write(printable(f"distbench: {Verdict.RANK_FAULT.value}: {failure}") + "\n")
        sys.stderr.flush()
    if failure.echo:
        time.sleep(_PEER_GRACE_S)
    os._exit(Verdict.RANK_FAULT.exit_code)
