"""Fake node for a launcher: writes the results that PLANTED asks for instead of running a suite.

PLANTED maps nodes that are in a group together, joined by +, to what happens to every such group: a verdict, `silent`
(exit 0 without results), `dies`, `half dies`, `late VERDICT`, `hangs` (until its standard input ends), `deaf` (hangs
all the same), `elsewhere` (sees another folder for results), `gone` (cannot be reached), `on the CPU` (passes there
unless it is given --device cuda; others have a device), or a number by which its times are multiplied.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


def probe(command: list[str], what: str | None) -> int:
    """Act as a node that checks whether it sees the results folder."""
    if what == "gone":
        return 255
    place = command.index("distbench.tools.cluster.shared_folder") + 1
    if what == "elsewhere":
        command[place] = f"{command[place]}.elsewhere"
    return subprocess.run(command, check=False).returncode


def main() -> int:
    """Act as one node of a group; the first of them has rank 0."""
    node, command = sys.argv[1], sys.argv[2:]
    planted = json.loads(os.environ["PLANTED"])
    if "distbench.tools.cluster.shared_folder" in command:
        return probe(command, planted.get(node))
    out = Path(command[command.index("--out") + 1])
    group = (out / "nodes.txt").read_text().split()
    what = next((what for nodes, what in planted.items() if set(nodes.split("+")) <= set(group)), "PASS")
    if what == "hangs" or (what == "half dies" and node == group[0]):
        sys.stdin.read()
    if what == "deaf":
        time.sleep(60)
    if what in ("dies", "half dies", "gone"):
        sys.stdout.write("the power went\n\n")
        return 9
    if isinstance(what, str) and what.startswith("late "):
        what = what.removeprefix("late ")
        time.sleep(1.0 if node == group[0] else 0.0)
    if what != "silent" and node == group[0]:
        from tests.results import result, timing, write_results  # noqa: PLC0415 - most of these processes write none

        scale = float(what) if isinstance(what, int | float) else 1.0
        on_cpu = what == "on the CPU"
        passes = isinstance(what, int | float) or (on_cpu and "cuda" not in command)
        verdict = "PASS" if passes else "UNSUPPORTED" if on_cpu else what
        ranks = [{"rank": 0, "host": node, "device": "cpu" if on_cpu else "cuda:0", "total_recv": 6}]
        noise = sum(map(ord, "".join(group))) % 7 / 100
        times = timing(scale + noise) | {"wall_s": 1.0}
        cases = [result(f"case {seed}", verdict, timing=times, ranks=ranks) for seed in range(2)]
        write_results(out, cases, cases=2)
    return 0 if what in ("silent", "on the CPU") or not isinstance(what, str) or what == "PASS" else 1


if __name__ == "__main__":
    sys.exit(main())
