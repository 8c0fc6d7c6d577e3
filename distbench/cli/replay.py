"""`distbench replay`: replay of a bundle, here or from its recording alone."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from distbench.cli.launcher_tasks import tell_task
from distbench.cli.options import add_case_options, add_folder, add_voice, case_flags
from distbench.cli.torchrun_rank import alone
from distbench.report.progress import Meter
from distbench.report.terminal import print_step, print_table, print_text, print_verdict
from distbench.utils.voice import Voice, voice

if TYPE_CHECKING:
    from distbench.report.bundle.findings import StageFinding
    from distbench.report.bundle.read import Bundle

_SHOWN_RANKS = 8
_AGREES = "as its report says"
_KEPT_INPUTS = (
    "rows are compared with the recorded tokens and oracle, and whether those were right cannot be seen any more"
)
_DIFFERS = "which is not what its report says"
_CONTRADICTED = "not confirmed: the experts of recorded tokens are not those in the recorded routing"
_OVERWRITTEN = (
    "inputs: some tokens were not sent as they were made: the transport, or what runs beside it, wrote to the rows "
    "that it was given"
)
_UNCONFIRMED = "not confirmed: the inputs generated here are not those recorded; use the version that wrote it"


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "replay",
        description="Analyse a bundle's recording, then run its case here and compare. Options of the case replace "
        "the recorded ones, such as --device cpu. Exit code 0: reproduced, or (--offline) the recording confirms "
        "its report.",
    )
    command.set_defaults(command=_replay)
    command.add_argument("bundle", metavar="BUNDLE", help="a bundle's folder")
    command.add_argument("--offline", action="store_true", help="only analyse the recording")
    add_folder(command)
    add_voice(command)
    add_case_options(command)


def _replay(options: argparse.Namespace) -> int:
    from distbench.report.bundle.read import open_bundle

    bundle = open_bundle(options.bundle)
    shows_the_same = _analyse(bundle)
    if options.offline:
        return 0 if shows_the_same else 1
    return _run(bundle, options)


def _analyse(bundle: Bundle) -> bool:
    print_step("replay: analysing the recording")  # what follows loads torch
    from distbench.report.bundle.analysis import analyse
    from distbench.report.bundle.findings import SENT
    from distbench.tools.lab import signature
    from distbench.workload.version import other_inputs

    report = bundle.report
    with Meter("replay: analysing the recording"):
        analysis = analyse(bundle)
    print_text(f"recorded: {signature(report)}; on {', '.join(report.environment.hosts) or 'unknown hosts'}")
    for cut in bundle.manifest.cuts:
        print_text(f"left out of the bundle: {cut}")
    if other := other_inputs(bundle.manifest.inputs_version):
        print_text(f"inputs: {other}; {_KEPT_INPUTS}")
    for missing in analysis.missing:
        print_text(f"missing: {missing}")
    if voice() is not Voice.QUIET:
        print_table(_stage_rows(analysis.findings), ("arm", "stage", "recorded rows", "wrong", "on rank", "first"))
    if analysis.judgement is None:
        print_text("no rows were recorded: the case was refused or lost its ranks")
        return False
    for found in analysis.diagnosis:
        print_text(f"diagnosis: {found.cause} ({found.confidence}): {found.evidence}")
    same = analysis.confirms(report.verdict, [found.cause for found in report.diagnosis])
    doubt = _CONTRADICTED if other_inputs(bundle.manifest.inputs_version) else _UNCONFIRMED
    if any(found.stage == SENT for found in analysis.findings):
        print_text(_OVERWRITTEN)
    agreement = (_AGREES if same else _DIFFERS) if analysis.trusted else doubt
    print_text(f"from the recording: {analysis.judgement.verdict.value}, {agreement}")
    return same


def _stage_rows(findings: list[StageFinding]) -> list[tuple[str, ...]]:
    """Rows of the table: one for each arm and stage, over all ranks."""
    rows: list[tuple[str, ...]] = []
    for arm, stage in dict.fromkeys((found.arm, found.stage) for found in findings):
        here = [found for found in findings if (found.arm, found.stage) == (arm, stage)]
        wrong = [found for found in here if found.wrong]
        first = next((str(found.first) for found in wrong if found.first is not None), "")
        ranks = ", ".join(str(found.rank) for found in wrong[:_SHOWN_RANKS])
        counts = str(sum(found.rows for found in here)), str(sum(found.wrong for found in here))
        rows.append((arm, stage, *counts, ranks, first))
    return rows


def _run(bundle: Bundle, options: argparse.Namespace) -> int:
    from distbench.cli.launching import hold_lab
    from distbench.launcher.preflight import check_case, check_folder
    from distbench.report.bundle.read import runnable_case
    from distbench.report.schema import parts_label
    from distbench.tools.lab import signature
    from distbench.tools.replay import compare
    from distbench.workload.version import other_inputs

    alone("replay")
    tell_task()
    case = runnable_case(bundle, case_flags(options))
    check_case(case)
    check_folder(options.out)
    if other := other_inputs(bundle.manifest.inputs_version):
        print_text(f"{other}: the run here has other inputs of the same seed, and its verdict may differ")
    with hold_lab(options) as lab:
        lab.work = "replay: the case here"
        report = lab.run([case])[0]
    replay = compare(bundle.report, report)
    rows = [(found.what, found.recorded, found.here) for found in replay.differences]
    if rows and not options.quiet:
        print_table(rows, ("differs", "recorded", "here"))
    parts = parts_label(report.plugins, report.stand_ins)
    code = 0 if replay.reproduced else 1
    print_verdict(f"{'not ' * code}reproduced here{parts}: {signature(report)}", code)
    return code
