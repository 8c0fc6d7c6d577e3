"""How often `distbench cluster` names a healthy node or link as slow, and how often it finds a slow node.

Healthy nodes differ by a normal deviation of 2 %, drawn per stage; each time has 1 % noise; a pair is as slow as its
slower end. Then one node is slower in one stage.
"""

from __future__ import annotations

import argparse
import math
import random

from distbench.case.stages import LAYER_STAGES, Stage
from distbench.tools.cluster.attribution import GroupRun
from distbench.tools.cluster.plan import STEPS, Step, rounds_of
from distbench.tools.cluster.stragglers import name_stragglers

KEYS = [f"case {number}" for number in range(24)]
OFFSET, NOISE = 0.02, 0.01
SLOW = ("node0",)


def cluster(count: int, seed: int, steps: tuple[Step, ...], slowdown: float = 1.0) -> list[GroupRun]:
    """Trials of `count` nodes, the first of which is `slowdown` times slower in its experts."""
    rng = random.Random(seed)  # noqa: S311 - a simulation
    nodes = [f"node{number}" for number in range(count)]
    levels = {(stage, node): rng.gauss(0, OFFSET) for stage in LAYER_STAGES for node in nodes}
    levels[Stage.EXPERTS, SLOW[0]] += math.log(slowdown)
    found = []
    for step in steps:
        for group in (group for one in rounds_of(step, nodes) for group in one):
            times: dict[str, dict[str, float]] = {
                stage: {key: math.exp(max(levels[stage, node] for node in group) + rng.gauss(0, NOISE)) for key in KEYS}
                for stage in LAYER_STAGES
            }
            found.append(GroupRun(step=step, nodes=group, exit_code=0, verdict="PASS", times=times))
    return found


def rates(count: int, steps: tuple[Step, ...], slowdown: float, runs: int) -> tuple[float, float]:
    """Fraction of runs that name a healthy node or a link, and fraction that name the slow node."""
    alarms = hits = 0
    for seed in range(runs):
        findings = name_stragglers(cluster(count, seed, steps, slowdown))
        hits += any(one.nodes == SLOW for one in findings)
        alarms += any(one.nodes != SLOW or slowdown == 1 for one in findings)
    return alarms / runs, hits / runs


def main() -> None:
    """Print a line for each number of nodes and each plan."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", default="5,6,8,16,64", help="numbers of nodes (default: %(default)s)")
    parser.add_argument("--slowdowns", default="1.1,1.2,1.3,1.5", help="of the slow node (default: %(default)s)")
    parser.add_argument("--plan", default="nodes", help="steps (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=2000, help="for each number (default: %(default)s)")
    options = parser.parse_args()
    steps = tuple(step for step in STEPS if step in options.plan.split(","))
    for count in map(int, options.nodes.split(",")):
        false, _ = rates(count, steps, 1.0, options.runs)
        found = {by: rates(count, steps, float(by), options.runs)[1] for by in options.slowdowns.split(",")}
        power = ", ".join(f"{share:.1%} at {by}" for by, share in found.items())
        print(f"{count} nodes, {options.plan}: {false:.2%} false alarms; slow node found: {power}", flush=True)


if __name__ == "__main__":
    main()
