"""Facts about the newest releases of mori, SGLang, aiter and vLLM that no longer match what distbench assumes.

Downloads the newest wheels, or reads those of the folder DISTBENCH_WHEELS, and prints a table. vLLM's wheel has a third
of a gigabyte and is read only where DISTBENCH_VLLM_WHEEL or that folder has one. Functions of the wheels are executed.

Exit codes: 0 all facts match; 1 a fact no longer matches; 3 all that could be read match, but a release or a file could
not be read.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

from packaging.version import Version

from tests.contract.facts import FACTS
from tests.contract.facts.fact import Fact, Finding, check
from tests.contract.facts.fetch import PINNED, VLLM, Distribution, download, newest_in
from tests.contract.facts.source import Source

WHEELS, VLLM_WHEEL = "DISTBENCH_WHEELS", "DISTBENCH_VLLM_WHEEL"


def main(arguments: list[str] | None = None) -> int:
    """Check all facts, print a table, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="folder that keeps the downloaded wheels (default: none is kept)")
    folder = parser.parse_args(arguments).folder
    with tempfile.TemporaryDirectory(prefix="distbench-drift-") as scratch:
        findings = [finding for one in PINNED for finding in findings_of(one, folder or Path(scratch))]
    print("\n".join(lines_of(findings)))
    return exit_code(findings)


def findings_of(one: Distribution, folder: Path) -> list[Finding]:
    """Findings of all facts about a distribution's newest wheel; none for vLLM where no wheel is named."""
    facts = [fact for fact in FACTS if fact.package == one.package]
    named = os.environ.get(VLLM_WHEEL, "") if one == VLLM else ""
    offline = os.environ.get(WHEELS, "")
    try:
        path = Path(named) if named else newest_in(Path(offline), one) if offline else None
        if path is None and one == VLLM:
            print(f"{one.name}: not read; {VLLM_WHEEL} or {WHEELS} may have its wheel")
            return []
        if path is None and offline:
            return _unreadable(facts, one, f"no wheel of {one.name} in {offline}")
        source = Source(path or download(one, folder))
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        return _unreadable(facts, one, str(error))
    if Version(source.version) < Version(PINNED[one]):
        return _unreadable(
            facts, one, f"the newest wheel found is {source.version}, older than {PINNED[one]}, which is pinned"
        )
    print(f"{one.name} {source.version}: {source.path.name}", flush=True)
    return [check(fact, source) for fact in facts]


def _unreadable(facts: Iterable[Fact], one: Distribution, reason: str) -> list[Finding]:
    return [Finding(fact, "?", "cannot be read", f"{one.name}: {reason}") for fact in facts]


def lines_of(findings: Iterable[Finding]) -> list[str]:
    """The table: a line for each fact and release, the changed ones last, with what is found there; and a count."""
    order = ("matches", "cannot be read", "no longer matches")
    told = sorted(findings, key=lambda one: order.index(one.state))
    releases = [f"{one.fact.package} {one.version}" for one in told]
    wide = [max(map(len, column), default=0) for column in ((one.state for one in told), releases)]
    lines = []
    for one, release in zip(told, releases, strict=True):
        lines.append(f"{one.state:{wide[0]}}  {release:{wide[1]}}  {one.fact.name}")
        lines += [f"    {one.fact.file}: {one.detail}"] * bool(one.detail)
    counts = [(sum(one.state == state for one in told), state) for state in order]
    return [*lines, ", ".join(f"{count} {state}" for count, state in counts)]


def exit_code(findings: Iterable[Finding]) -> int:
    """0, 1 or 3: see above."""
    states = {one.state for one in findings}
    return 1 if "no longer matches" in states else 3 if "cannot be read" in states else 0


if __name__ == "__main__":
    sys.exit(main())
