"""`make amd`: the first run on an AMD node. Continues after a failed step, and leaves one archive to send.

    python3 scripts/amd.py [--nproc 8] [--emulate] [--venv .venv] [--out FOLDER] [options of distbench run]

The steps take the chain apart before they run it whole, so that the first failure names a part: distbench alone, MoRI
alone, aiter alone, both on two ranks, both on all. The archive holds facts about the node, the doctor's findings,
imports with their tracebacks, reports and logs of each step, the compilers' logs, and a summary. Exit code: 0 where
every step ended as it should, 1 where one did not, 130 interrupted; the archive is written all the same.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import amd_facts as facts

ROOT = Path(__file__).resolve().parents[1]
_STEP_SECONDS = 5400.0
_GRACE_SECONDS = 30
_LOG_BYTES = 4 << 20
_FILE_BYTES = 16 << 20
_ARCHIVE_BYTES = 128 << 20
_SHOWN_LINES = 15
_BUILD_LOGS = 40
_SAY_SECONDS = 30.0
_NOTE_CHARACTERS = 400
_LOGS = (".log", ".ninja", ".ninja_log")
_BUILT = (*_LOGS, ".so", ".co", ".hsaco", ".built")
_NOTED = ("lock_", ".lock", ".ninja_log")
_CODES = {"PASS": 0, "UNDER_LIMIT": 1}
_ERROR_LINE = re.compile(r"[A-Za-z_.]*(?:Error|Exception|Interrupt)\b")


class Step(NamedTuple):
    """A command, its expected end, and the meaning of a failure. `needs` is a path that the step requires.

    `verdict` is the expected verdict of its report, since exit code 1 stands for every wrong result.
    """

    name: str
    command: list[str]
    expected: tuple[int, ...]
    meaning: str
    needs: str = ""
    verdict: str = ""

    @property
    def wanted(self) -> str:
        """Expected end, in words."""
        return f"{' or '.join(map(str, self.expected))} {self.verdict}".rstrip()


class Ended(NamedTuple):
    """End of a step: its exit code (None if it did not run), and the reason or the summary of its report."""

    step: Step
    code: int | None
    seconds: float
    note: str

    @property
    def is_right(self) -> bool:
        """Whether the step ended as expected."""
        return self.code in self.step.expected and self.note.startswith(self.step.verdict)


def main() -> int:
    """Run all steps, write the archive, and print its path."""
    options, more = _options()
    out = Path(options.out or f"distbench-out/amd-{time.strftime('%Y%m%d-%H%M%S')}").absolute()
    os.chdir(ROOT)
    out.mkdir(parents=True)
    _say(f"results in {out}; every step runs, even if others fail")
    for ending in (signal.SIGTERM, signal.SIGHUP):  # a scheduler's time limit, a terminal that has gone
        signal.signal(ending, signal.default_int_handler)
    ended: list[Ended] = []
    code = 1
    try:
        _collect_facts(out, facts.TOOLS)
        if not options.emulate:
            os.environ.setdefault("AITER_LOG_MORE", "1")  # what its compilers are called with, and say
        steps = _steps(options, more, out)
        for number, step in enumerate(steps, 1):
            _say(f"step {number} of {len(steps)}: {step.name}")
            ended.append(_run(step, out, options.step_timeout))
        code = 0 if all(one.is_right for one in ended) else 1
    except KeyboardInterrupt:
        _say("interrupted; what there is goes into the archive")
        code = 130
    _collect_facts(out, facts.TOOLS_AFTER)
    _collect_build_logs(out, f"{options.venv}/bin/python")
    summary = _summary(ended, options, code)
    _write(out / "summary.md", summary)
    archive = _pack(out)
    print(summary)
    _say(f"send {archive} ({archive.stat().st_size >> 10} KiB). Look through it first: it names hosts, users and paths")
    return code


def _options() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--nproc", type=int, default=8, metavar="N", help="ranks (default: %(default)s)")
    parser.add_argument("--venv", default=".venv", metavar="DIR", help="environment (default: %(default)s)")
    parser.add_argument(
        "--out", default="", metavar="DIR", help="folder that must not exist (default: one with the time)"
    )
    parser.add_argument("--emulate", action="store_true", help="stand-ins for mori, aiter and devices")
    parser.add_argument("--skip-setup", action="store_true", help="the environment is complete")
    parser.add_argument(
        "--step-timeout",
        type=float,
        default=_STEP_SECONDS,
        metavar="S",
        help="seconds for a step (default: %(default)s)",
    )
    return parser.parse_known_args()


def _steps(options: argparse.Namespace, more: Sequence[str], out: Path) -> list[Step]:
    """Steps in their order."""
    python, distbench = f"{options.venv}/bin/python", f"{options.venv}/bin/distbench"
    make = ["make", "-s", "setup", f"VENV={options.venv}"]
    setup = [] if options.skip_setup else [Step("setup", make, (0,), "distbench cannot be installed here")]
    imports = [
        Step(
            f"import-{name}",
            [python, "-X", "faulthandler", "-c", facts.IMPORT, name],
            _any(options, name),
            meaning,
            python,
        )
        for name in facts.MODULES
        for meaning in [f"{name} cannot be imported: its log has the traceback, libraries what the loader misses"]
    ]
    doctor = [distbench, "doctor", "--for", "mori", "--nproc", str(options.nproc)]
    usable = (0, 1, 2) if options.emulate else (0, 1)
    return [
        *setup,
        Step("packages", [python, "-m", "pip", "list"], (0, 1), "", python),
        Step("libraries", [python, "-c", facts.LIBRARIES], (0,), "", python),
        Step("collect-env", [python, "-m", "torch.utils.collect_env"], (0, 1), "", python),
        *imports,
        Step("doctor", doctor, usable, "the node lacks what the log says", distbench),
        Step("doctor-json", [*doctor, "--json"], usable, "", distbench),
        Step("kernels", [distbench, "kernels", "--model", "qwen3-30b-a3b", "--limits", "64,512"], (0,), "", distbench),
        *_cases(options, more, out, distbench),
    ]


def _any(options: argparse.Namespace, module: str) -> tuple[int, ...]:
    """Exit codes that an import may have: any if the module is not needed."""
    needed = module == "torch" or (not options.emulate and module.startswith(("mori", "aiter")))
    return (0,) if needed else (0, 1)


def _cases(options: argparse.Namespace, more: Sequence[str], out: Path, distbench: str) -> list[Step]:
    """Steps that run a case: each part alone, then both."""
    tiny = ["--model", "tiny", "--hidden-size", "512", "--tokens", "8"]
    layer = ["--model", "qwen3-30b-a3b", "--tokens", "64"]
    where = ["--device", "cpu", "--emulate"] if options.emulate else ["--device", "cuda"]
    rows, experts = ["--transport", "mori"], ["--experts", "aiter"]

    def case(name: str, verdict: str, meaning: str, *arguments: str, ranks: int = 0) -> Step:
        target = ["--nproc", str(ranks or options.nproc), "--out", str(out / "steps" / name)]
        bundle = ["--bundle", str(out / "bundles")]
        command = [distbench, "run", *target, *bundle, *arguments, *(more if name != "cpu" else ())]
        return Step(name, command, (_CODES[verdict],), meaning, distbench, verdict)

    two = min(options.nproc, 2)
    return [
        case("cpu", "PASS", "distbench itself does not run here, devices aside", *tiny, "--device", "cpu"),
        case("devices", "PASS", "torch's collectives fail between these devices", *tiny, *where),
        case("mori-alone", "PASS", "MoRI moves rows wrongly, or not at all, without aiter", *tiny, *where, *rows),
        case("aiter-alone", "PASS", "aiter computes wrongly, or not at all, without MoRI", *tiny, *where, *experts),
        case("two-ranks", "PASS", "both fail together on two devices", *tiny, *where, *rows, *experts, ranks=two),
        case("smoke", "PASS", "both fail together on all devices", *tiny, *where, *rows, *experts),
        case(
            "layer", "PASS", "a real layer with a safe limit fails", *layer, *where, *rows, *experts, "--limit", "sum32"
        ),
        case(
            *("short-limit", "UNDER_LIMIT", "a limit that loses a row did not end in UNDER_LIMIT"),
            *(*layer, *where, *rows, *experts, "--limit", "max-recv-1"),
        ),
    ]


def _run(step: Step, out: Path, seconds: float) -> Ended:
    """Run a step; its output goes to the terminal and to a log."""
    if step.needs and not Path(step.needs).exists():
        return Ended(step, None, 0.0, f"not run: there is no {step.needs}")
    log = out / "logs" / f"{step.name}.log"
    log.parent.mkdir(exist_ok=True)
    start = time.monotonic()
    with log.open("wb") as file:
        file.write(f"$ {' '.join(step.command)}\n".encode())
        file.flush()
        try:
            code, note = _wait(step, file.fileno(), seconds)
        except OSError as error:
            code, note = None, f"not run: {error.strerror}"
    took = time.monotonic() - start
    note = note or _verdict(out / "steps" / step.name / "report.json") or _said(log)
    ended = Ended(step, code, took, note)
    if not ended.is_right:
        _say(f"{step.name} ended with {code}, expected {step.wanted}: {note or step.meaning}")
        print("\n".join(f"    {line}" for line in log.read_text(errors="replace").splitlines()[-_SHOWN_LINES:]))
    return ended


def _wait(step: Step, log: int, seconds: float) -> tuple[int, str]:
    """Run a step in its own process group, print that it is still running, and terminate it at its timeout."""
    environ = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        step.command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environ, start_new_session=True
    )
    start = time.monotonic()
    try:
        while (left := seconds - (time.monotonic() - start)) > 0:
            if _has_ended(process, min(left, _SAY_SECONDS)):
                return process.returncode, ""
            _say(f"{step.name} goes on, {time.monotonic() - start:.0f} of at most {seconds:.0f} s")
    except KeyboardInterrupt:
        _end(process)
        raise
    _end(process)
    return process.returncode, f"no end within {seconds:.0f} s"


def _has_ended(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _end(process: subprocess.Popen[bytes]) -> None:
    for sent in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sent)
        if _has_ended(process, _GRACE_SECONDS):
            return


def _verdict(report: Path) -> str:
    """Summary of a report in one line; empty if the file is missing or broken."""
    try:
        found = json.loads(report.read_text())
    except (OSError, ValueError):
        return ""
    reasons = "; ".join(str(reason.get("message", "")) for reason in found.get("reasons", [])[:2])
    divergence = found.get("first_divergence") or {}
    where = f", first in {divergence.get('arm')}/{divergence.get('stage')}" if divergence else ""
    emulated = " (emulated)" if found.get("emulated") else ""
    return f"{found.get('verdict')}{emulated}{where}: {reasons}".removesuffix(": ")[:_NOTE_CHARACTERS]


def _said(log: Path) -> str:
    """Last line in which distbench, or Python, reports the end of a command; empty if there is none."""
    lines = log.read_text(errors="replace").splitlines()
    said = [line for line in lines if line.startswith("distbench: ") or _ERROR_LINE.match(line)]
    return said[-1][:_NOTE_CHARACTERS] if said else ""


def _collect_facts(out: Path, tools: dict[str, list[str]]) -> None:
    for name, command in tools.items():
        _write(out / "node" / f"{name}.txt", facts.output_of(command))
    if tools is facts.TOOLS:
        _write(out / "node" / "variables.txt", facts.variables(os.environ))
        _write(out / "node" / "process.txt", facts.identity())
        for path, text in facts.files().items():
            _write(out / "node" / "files" / f"{path.strip('/').replace('/', '.')}.txt", text)


def _collect_build_logs(out: Path, python: str) -> None:
    """Copy the newest logs of aiter's and MoRI's compilers, and list the built files and the locks."""
    folders = facts.build_folders(python)
    inside = [path for folder in folders if folder.is_dir() for path in folder.rglob("*")]
    found = sorted(path for path in inside if path.suffix in _BUILT or path.name.startswith(_NOTED))
    listed = "".join(f"{_facts_of(path)} {path}\n" for path in found)
    _write(out / "build" / "caches.txt", f"looked in {', '.join(map(str, folders))}\n{listed or 'nothing was built'}\n")
    logs = [path for path in found if path.suffix in _LOGS or path.name.startswith(_NOTED)]
    for path in sorted(logs, key=_age)[:_BUILD_LOGS]:
        _write(out / "build" / f"{str(path).strip('/').replace('/', '.')}.txt", _tail(path))


def _age(path: Path) -> float:
    """Seconds since each file was written, the newest first; deleted files are left out."""
    with contextlib.suppress(OSError):
        return time.time() - path.stat().st_mtime
    return 0.0


def _facts_of(path: Path) -> str:
    with contextlib.suppress(OSError):
        return f"{path.stat().st_size:>12} {time.ctime(path.stat().st_mtime)}"
    return "it has gone"


def _tail(path: Path) -> str:
    """Last bytes of a file as text."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _LOG_BYTES))
            return file.read().decode(errors="replace")
    except OSError as error:
        return f"cannot be read: {error.strerror}\n"


def _summary(ended: Sequence[Ended], options: argparse.Namespace, code: int) -> str:
    first = next((one for one in ended if not one.is_right), None)
    kind = "emulated: stand-ins for mori, aiter and devices" if options.emulate else "mori and aiter on devices"
    lines = [f"# distbench on an AMD node, {options.nproc} ranks ({kind})", ""]
    if first is not None:
        lines += [f"First failure: **{first.step.name}**. {first.step.meaning}", "", f"    {first.note}", ""]
    lines += [
        f"Exit code {code}.",
        "",
        "| step | exit code | expected | seconds | what it says |",
        "|---|---|---|---|---|",
    ]
    for one in ended:
        mark = "" if one.is_right else "**FAILED** "
        told = one.note.replace("|", "/")
        lines.append(f"| {one.step.name} | {one.code} | {one.step.wanted} | {one.seconds:.0f} | {mark}{told} |")
    lines += [
        "",
        "logs/STEP.log has the output of a step, steps/STEP its reports, journal and stacks, bundles a failing case's",
        "inputs, node the facts (node/variables.txt: secrets are left out), build the compilers' logs.",
        "",
    ]
    return "\n".join(lines)


def _pack(out: Path) -> Path:
    """Write the archive beside the folder: texts without secrets, up to the size limit."""
    archive = out.with_name(out.name + ".tar.gz")
    left, dropped = _ARCHIVE_BYTES, []
    with tarfile.open(archive, "w:gz") as tar:
        for path in sorted((one for one in out.rglob("*") if one.is_file()), key=lambda one: one.stat().st_size):
            name = path.relative_to(out)
            if path.suffix in (".log", ".txt", ".md", ".json", ".jsonl"):
                _redact(path)
            size = path.stat().st_size
            if size > min(left, _FILE_BYTES):
                dropped.append(f"{size:>12} {name}")
                continue
            left -= size
            tar.add(path, f"{out.name}/{name}", recursive=False)
        if dropped:
            _write(out / "left-out.txt", "too large, still on the node:\n" + "\n".join(dropped) + "\n")
            tar.add(out / "left-out.txt", f"{out.name}/left-out.txt")
    return archive


def _redact(path: Path) -> None:
    if path.stat().st_size > _LOG_BYTES and path.suffix in (".log", ".txt"):
        path.write_text(_tail(path))
    text = path.read_text(errors="replace")
    kept = facts.redacted(text, os.environ)
    if kept != text:
        path.write_text(kept)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _say(text: str) -> None:
    print(f"amd: {text}", flush=True)


if __name__ == "__main__":
    if shutil.which("git") is None:
        _say("git is not there: the archive will not name the commit")
    sys.exit(main())
