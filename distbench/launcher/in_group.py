"""A case on the ranks of a job that somebody else has launched: no process is started, and none watched."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from contextlib import closing
from typing import Any

import msgspec
import torch.distributed as dist

from distbench.case.entry import Entry
from distbench.case.resolve import FLAGS, Layer, Resolved, resolve_case
from distbench.distributed.in_group import GroupSession
from distbench.errors import Verdict
from distbench.launcher.preflight import check_case
from distbench.pipeline.in_group import Functions
from distbench.pipeline.run_case import run_case
from distbench.report.document import build_report
from distbench.report.environment import capture_environment
from distbench.verify.records import Outcome

_NAME, _SUITE = "run_in_group", "distbench.api"
_NO_NAME = re.compile(r"\W+|^(?=\d)", re.ASCII)


def report_of_group(group: dist.ProcessGroup | None, keys: Mapping[str, Any], functions: Functions) -> bytes:
    """Run a case on the ranks of `group`; the report as JSON, on every rank. Collective.

    Raises:
        InvalidCase, Unsupported: on every rank.
        BrokenContract: on the rank where a function broke a rule.
    """
    brought = functions.brought()
    named = {
        part: name_of(getattr(functions, function))
        for part, function in (("transport", "dispatch"), ("experts", "experts"))
        if getattr(functions, function) is not None
    }
    with closing(GroupSession(group)) as session:
        with session.together():
            resolved = resolve_case([Layer(FLAGS, dict(keys) | named)], session.world_size)
            warnings = check_case(resolved.case, session.local_ranks)
        began = time.monotonic()
        outcome = run_case(session, resolved.case, brought=brought)
        report = b"" if outcome is None else _report(resolved, warnings, outcome, time.monotonic() - began)
        told = [report]
        dist.broadcast_object_list(told, group=session.group, group_src=0)
    return told[0]


def _report(resolved: Resolved, warnings: tuple[str, ...], outcome: Outcome, wall_s: float) -> bytes:
    """The report of rank 0 as JSON."""
    entry = Entry(
        name=_NAME,
        suite=_SUITE,
        case=resolved.case,
        sources=resolved.sources,
        expect=Verdict.PASS.value,
        warnings=(*resolved.notes, *warnings),
    )
    records = outcome.gathered.observations if outcome.gathered else []
    environment = capture_environment(os.environ, [one.host for one in records], [one.device for one in records])
    return msgspec.json.encode(build_report(entry, outcome, environment=environment, wall_s=wall_s))


def name_of(function: Any) -> str:
    """Name of a function in a case, as a reference that no other process loads."""
    module = getattr(function, "__module__", None) or type(function).__module__
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    return f"{_NO_NAME.sub('_', module)}:{_NO_NAME.sub('_', name)}"
