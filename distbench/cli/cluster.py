"""`distbench cluster`: each node alone, pairs of nodes, all together; names the node or link at fault."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distbench.cli.argument_types import LEAST_SECONDS, MOST_RANKS, seconds, whole
from distbench.cli.options import DEFAULT_OUT, add_case_options, add_report, add_voice, case_flags, report_writers
from distbench.errors import InvalidCase, exit_meaning
from distbench.report.progress import Meter
from distbench.report.terminal import print_note, print_step, print_text, print_verdict
from distbench.utils.signals import collect_signals

if TYPE_CHECKING:
    from distbench.tools.cluster.attribution import GroupRun
    from distbench.tools.cluster.plan import Round, Step
    from distbench.tools.cluster.validation import Validation

_SHOWN_HOSTS = 4
_MOST_PORTS = 65536
# A rendezvous on one of these hosts is on one machine, whatever the nodes are called.
_LOOPBACK = "127.0.0.1"


def add(commands: Any) -> None:
    """Add the command to the parser."""
    from distbench.tools.cluster.launchers import LAUNCHERS
    from distbench.tools.cluster.plan import STEPS

    command = commands.add_parser(
        "cluster",
        description="Run a suite on groups of nodes, name the node or link at fault from the pattern of failures and "
        "the slow node from the distribution of times, and write lists for a scheduler. Start it on one node.",
    )
    command.set_defaults(command=_cluster)
    command.add_argument("suite", metavar="FILE|NAME", help="suite of every group, as for `distbench suite`")
    command.add_argument("--plan", metavar="STEPS", default=",".join(STEPS), help="steps (default: %(default)s)")
    command.add_argument(
        "--nodes",
        metavar="A,B,…|@FILE",
        default="",
        help="host names, node[01-04] too, or a host file (default: those of the Slurm job)",
    )
    command.add_argument(
        "--launcher",
        metavar="NAME|JSON",
        default="",
        help=f"how to start a command on a node: {', '.join(LAUNCHERS)}, or a JSON list of arguments with {{host}} "
        "(default: slurm inside a job of it)",
    )
    command.add_argument(
        "-n",
        "--nproc",
        type=whole(1, MOST_RANKS),
        metavar="RANKS",
        default=8,
        help="ranks on each node (default: %(default)s)",
    )
    command.add_argument(
        "--out",
        metavar="DIR",
        default=f"{DEFAULT_OUT}/cluster",
        help="folder shared by all nodes (default: %(default)s)",
    )
    command.add_argument(
        "--port",
        type=whole(1, _MOST_PORTS - 1),
        metavar="PORT",
        default=29500,
        help="first port (default: %(default)s)",
    )
    command.add_argument(
        "--trial-timeout",
        type=seconds(LEAST_SECONDS),
        metavar="SECONDS",
        default=1800.0,
        help="time for a group (default: %(default)s)",
    )
    command.add_argument("--select", metavar="TERMS", default="", help="as for `distbench suite`")
    add_case_options(command, ("device",))
    command.add_argument(
        "--join-timeout",
        type=seconds(LEAST_SECONDS),
        metavar="SECONDS",
        default=120.0,
        help="time for the nodes of a group to join (default: %(default)s)",
    )
    add_report(command)
    add_voice(command)
    command.add_argument(
        "--endpoint-host", metavar="HOST", default="", help="rendezvous of a group's ranks (default: its first node)"
    )


def _cluster(options: argparse.Namespace) -> int:
    from distbench.launcher.locks import hold
    from distbench.launcher.preflight import check_folder, check_path
    from distbench.report.export import write_reports
    from distbench.tools.cluster import reports
    from distbench.tools.cluster.group_runs import Settings, check_shared, run_round
    from distbench.tools.cluster.launchers import LAUNCHERS, LOCAL, parse_launcher
    from distbench.tools.cluster.validation import validate

    steps, nodes = _steps(options.plan), _nodes(options.nodes, options.nproc)
    launcher = options.launcher or ("slurm" if "SLURM_JOB_ID" in os.environ else "")
    if not launcher:
        message = f"launcher: none given and no Slurm job; allowed are {', '.join(LAUNCHERS)} or a JSON list"
        raise InvalidCase(message)
    meeting_host = _LOOPBACK if launcher == LOCAL else options.endpoint_host
    check_path(options.out)
    check_folder(options.out)
    _check_port(options.port, len(nodes))
    suite, cases = _check_suite(options, steps, len(nodes))
    writers = report_writers(options, Path(options.out), reports.__name__)
    settings = Settings(
        suite=str(Path(options.suite).resolve()) if Path(options.suite).exists() else options.suite,
        options=_suite_options(options),
        nproc=options.nproc,
        out=Path(options.out).resolve(),
        timeout_s=options.trial_timeout,
        join_timeout_s=options.join_timeout,
        launcher=parse_launcher(launcher),
        port=options.port,
        endpoint_host=meeting_host,
    )
    with hold(settings.out, (), 0.0), collect_signals() as signals:

        def run(step: Step, groups: Round) -> list[GroupRun]:
            print_step(f"{step}: {', '.join('+'.join(group) for group in groups)}")
            with Meter(f"cluster: {step}", len(groups) * cases) as meter:
                return run_round(settings, step, groups, signals, meter)

        with Meter(f"cluster: looking whether {len(nodes)} nodes share {settings.out}"):
            check_shared(settings, nodes, signals)
        validation = validate(nodes, steps, run, emulated=meeting_host == _LOOPBACK, suite=suite)
    _write(settings.out, validation)
    write_reports(validation, writers)
    print_validation(settings.out, validation)
    return validation.exit_code


def _suite_options(options: argparse.Namespace) -> tuple[str, ...]:
    """Options that the suite's command on each node takes over from this one."""
    given = {"--select": options.select, "--device": options.case_device}
    return tuple(word for name, value in given.items() if value for word in (name, value))


def _steps(text: str) -> tuple[Step, ...]:
    from distbench.tools.cluster.plan import STEPS

    wanted = [part.strip() for part in text.split(",")]
    if not set(wanted) <= set(STEPS):
        message = f"plan {text!r:.80}: allowed are {', '.join(STEPS)}"
        raise InvalidCase(message)
    return tuple(step for step in STEPS if step in wanted)


def _nodes(text: str, nproc: int) -> tuple[str, ...]:
    """Host names of `--nodes`, of the file that it names, or of the Slurm job; notes slots other than `nproc`."""
    from distbench.tools.cluster.host_lists import parse_host_file, parse_hosts

    if text.startswith("@"):
        try:
            hosts = parse_host_file(Path(text[1:]).read_text(encoding="utf-8"), text[1:])
        except (OSError, ValueError) as error:
            message = f"nodes {text!r:.80}: {error}; name a file with one host a line"
            raise InvalidCase(message) from error
    else:
        hosts = parse_hosts(text or os.environ.get("SLURM_JOB_NODELIST", ""))
    other = [f"{name} {slots}" for name, slots in hosts.slots.items() if slots != nproc]
    if other:
        more = f" and {len(other) - _SHOWN_HOSTS} more" if len(other) > _SHOWN_HOSTS else ""
        print_note(f"slots of {', '.join(other[:_SHOWN_HOSTS])}{more} are not used: {nproc} ranks on each (--nproc)")
    return hosts.names


def _check_port(port: int, nodes: int) -> None:
    most = _MOST_PORTS - 1 - nodes // 2
    if port > most:
        message = f"--port {port}: allowed are 1 to {most} with {nodes} nodes"
        raise InvalidCase(message)


def _check_suite(options: argparse.Namespace, steps: Sequence[Step], nodes: int) -> tuple[str, int]:
    """Name of the suite, and number of its cases for a group.

    Refuses one that cannot be read, or selects nothing, for the ranks of a group of the plan.
    """
    from distbench.case.environment import reader
    from distbench.case.suite import load_suite, select

    name, cases = "", 0
    sizes = {"nodes": 1, "pairs": min(nodes, 2), "all": nodes}
    for size in sorted({sizes[step] for step in steps}):
        flags = case_flags(options)
        suite = load_suite(options.suite, size * options.nproc, flags, reader(os.environ))
        name, cases = suite.name, len(select(suite.entries, options.select))
    return name, cases


def _write(out: Path, validation: Validation) -> None:
    from distbench.report.files import write_atomically
    from distbench.tools.cluster.validation import FILE, document

    write_atomically(out / FILE, document(validation))
    for name, nodes in (("defects.txt", validation.defects), ("slow.txt", validation.slow)):
        write_atomically(out / name, "".join(f"{node}\n" for node in nodes).encode())


def print_validation(out: Path, validation: Validation) -> None:
    """Print the findings, gaps and counts of a plan, the exit code last."""
    from distbench.tools.cluster.validation import FILE

    for found in validation.findings:
        print_text(f"{found.kind} {' '.join(found.nodes)}: {found.evidence}".replace(" :", ":"))
    for step in validation.not_run:
        print_text(f"{step}: not run, too few nodes are left or all share a fault")
    for gap in validation.not_judged:
        print_text(f"not judged: {gap}")
    passed = sum(not trial.failed for trial in validation.trials)
    emulated = " (emulated: all nodes are this machine)" if validation.emulated else ""
    print_text(f"{passed} of {len(validation.trials)} groups of {len(validation.nodes)} nodes pass{emulated}")
    ending = f"exit {validation.exit_code}, {exit_meaning(validation.exit_code)}"
    print_verdict(f"{ending}: {out}/{FILE}, defects.txt, slow.txt", validation.exit_code)
