"""Limits that `distbench advise` calls proven or seen, against cases that run on the CPU.

Proven: a random deployment, with shared and replicated experts in most, is asked for its smallest proven limit, and a
random batch within its tokens is cut there, whatever arrives. It has to end in PASS, or in OVERFLOW where the buffer is
smaller than the batch; one ends UNDER_LIMIT where the proof is wrong. Every tenth deployment also runs the case file
that advise writes with one row less, which has to end UNDER_LIMIT: so the check can fail.

Seen: a random recording is asked with a limit that some of its steps exceed. Each of its steps and layers runs with it:
those that end UNDER_LIMIT have to be the steps that advise names, and no others.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
from clean_cases import Keys, run_suite

from distbench.cli.main import main as distbench

CASES_A_SUITE = 250
SHORT_EVERY = 10
MOST_TOKENS = 24
STEPS, LAYERS = 8, 2
M = 64
PASSES = ("PASS", "OVERFLOW")
Report = dict[str, Any]


def main() -> int:
    """Run the suites, print what was wrong, and return 1 if anything was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000, metavar="N", help="deployments (default: %(default)s)")
    parser.add_argument("--recordings", type=int, default=50, metavar="N", help="default: %(default)s")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="first seed (default: %(default)s)")
    parser.add_argument("--nproc", type=int, default=8, metavar="P", help="ranks at most (default: %(default)s)")
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="distbench-advised-") as name:
        folder, seeds = Path(name), range(options.first, options.first + max(options.cases, options.recordings))
        cases = [case for seed in seeds[: options.cases] for case in _deployment(folder, seed, options.nproc)]
        asked = {f"r{seed}": _recording(folder, seed, options.nproc) for seed in seeds[: options.recordings]}
        cases += [case for _, some in asked.values() for case in some]
        reports = list(_reports(folder, cases, options.nproc))
    missing = [f"{len(cases) - len(reports)} cases left no report"] if len(reports) < len(cases) else []
    wrong = [*missing, *_proven(reports), *_seen(reports, {name: named for name, (named, _) in asked.items()})]
    print(*wrong, f"{len(wrong)} wrong, {time.monotonic() - began:.0f} s", sep="\n")
    return 1 if wrong else 0


def _proven(reports: list[Report]) -> Iterable[str]:
    """Yield what is wrong with the deployments' reports."""
    counts: collections.Counter[str] = collections.Counter()
    short = 0
    for report in (one for one in reports if one["name"].startswith("seed")):
        one_less = report["name"].endswith("short")
        short += one_less
        counts[report["verdict"]] += not one_less
        if report["verdict"] not in (("UNDER_LIMIT",) if one_less else PASSES):
            yield _told(report)
    print(f"proven: {sum(counts.values())} cases, {dict(+counts)}; a row less: {short}")


def _deployment(folder: Path, seed: int, nproc: int) -> list[Keys]:
    """A case at the limit that advise proves for a random deployment, and in some the case with one row less."""
    chance = random.Random(f"deployment {seed}")  # noqa: S311 - a choice of cases, no secret
    ranks = chance.randint(2, nproc)
    most = [chance.choice((0, 1, 5, chance.randint(1, MOST_TOKENS))) for _ in range(ranks)]
    most[chance.randrange(ranks)] = MOST_TOKENS
    layer = _layer(chance, ranks)
    if chance.random() < 0.1:  # noqa: PLR2004 - a tenth of them have a small buffer
        layer["prealloc_max_recv_tokens"] = chance.randint(ranks, sum(most))
    short = folder / f"cases{seed}"
    found = _advice(folder, layer, ranks, f"--tokens={','.join(map(str, most))}", f"--cases={short}")
    (limit,) = (one["limit"] for one in found["candidates"] if "smallest proven" in one["reasons"])
    tokens = most if chance.random() < 0.5 else [chance.randint(0, count) for count in most]  # noqa: PLR2004 - half
    case = layer | _parts(chance, ranks, layer) | {
        "name": f"seed {seed}",
        "ep_size": ranks,
        "tokens": tokens if any(tokens) else most,
        "limit": limit,
        "policy": "unchecked",
        "routing": _routing(chance, ranks, layer),
        "numerics": chance.choice(("exact", "exact", "exact", "both")),
        "max_dispatch_tokens_per_rank": M,
        "seed": seed,
    }  # fmt: skip
    if seed % SHORT_EVERY or "prealloc_max_recv_tokens" in layer:
        return [case]
    file = msgspec.toml.decode((short / "one-less.toml").read_text())
    return [case, file | {"name": f"seed {seed} short"}]


def _layer(chance: random.Random, ranks: int) -> Keys:
    """Keys of a layer and its slots: replicas by number or by table, uneven, also of fewer experts than ranks."""
    local = chance.randint(1, 4)
    keys: Keys = {"model": "custom", "hidden_size": 64 * chance.randint(1, 3), "intermediate_size": 64}
    kind = chance.choice(("plain", "round robin", "table"))
    experts = local * ranks if kind == "plain" else chance.randint(1, local * ranks)
    keys |= {"num_experts": experts, "topk": chance.randint(1, min(experts, 4))}
    if kind == "round robin":
        keys["physical_experts"] = local * ranks
    if kind == "table":
        table = [*range(experts), *(chance.randrange(experts) for _ in range(local * ranks - experts))]
        keys["placement"] = chance.sample(table, len(table))
    shared = chance.choice((0, 1, 1, 2))
    return keys | ({"shared_experts": shared} if shared else {})


def _parts(chance: random.Random, ranks: int, layer: Keys) -> Keys:
    """Transport and experts, and dropped slots and static replicas where they run."""
    replicated = "physical_experts" in layer or "placement" in layer
    keys: Keys = {"replica_choice": chance.choice(("dynamic", "static"))} if replicated else {}
    if chance.random() < 0.3:  # noqa: PLR2004 - three in ten with ids of -1
        keys |= {"dropped_slots": chance.choice((0.1, 0.5)), "dropped_tokens": chance.choice((0.0, 0.2))}
    if "prealloc_max_recv_tokens" in layer:
        return keys
    if ranks in (2, 4, 8) and chance.random() < 0.2:  # noqa: PLR2004 - a fifth of those that MoRI takes
        keys |= {"transport": "mori", "emulate": True, "cu_count": 256}
    if "dropped_slots" not in keys and chance.random() < 0.2:  # noqa: PLR2004 - a fifth of those that aiter takes
        keys |= {"experts": "aiter", "emulate": True, "cu_count": 256}
    return keys


def _routing(chance: random.Random, ranks: int, layer: Keys) -> str:
    """A kind of routing that the slots allow: one that names a rank in half of the cases."""
    plain = "physical_experts" not in layer and "placement" not in layer
    others = ["local", "duplicates"] if plain and layer["topk"] <= layer["num_experts"] // ranks else []
    if chance.random() < 0.5:  # noqa: PLR2004 - half of them
        return f"hot-rank:{chance.randrange(ranks)}"
    return chance.choice(["uniform", "zipf:1.2", *others])


def _seen(reports: list[Report], asked: dict[str, set[int]]) -> Iterable[str]:
    """Yield what is wrong with the recordings' reports; `asked` are the steps that advise names."""
    exceeded: dict[str, set[int]] = {name: set() for name in asked}
    count = 0
    for report in (one for one in reports if one["name"].startswith("r")):
        name, step, _ = report["name"].split(".")
        count += 1
        if report["verdict"] == "UNDER_LIMIT":
            exceeded[name].add(int(step))
        elif report["verdict"] != "PASS":
            yield _told(report)
    for name, named in asked.items():
        if exceeded[name] != named:
            yield f"{name}: advise names steps {sorted(named)}, UNDER_LIMIT end {sorted(exceeded[name])}"
    steps = sum(map(len, exceeded.values()))
    print(f"seen: {len(asked)} recordings, {count} steps and layers, {steps} steps above their limit")


def _recording(folder: Path, seed: int, nproc: int) -> tuple[set[int], list[Keys]]:
    """Steps that advise names for a limit, and a case of each step and layer with it."""
    chance = random.Random(f"recording {seed}")  # noqa: S311 - a choice of cases, no secret
    ranks, tokens, shared = chance.randint(2, nproc), chance.randint(2, MOST_TOKENS), chance.randint(0, 1)
    experts = ranks * chance.randint(2, 4)
    topk = chance.randint(1, min(4, experts // 2))
    path = folder / f"{seed}.safetensors"
    shape = [f"--num-experts={experts}", f"--topk={topk}", f"--ep-size={ranks}", f"--tokens={tokens}"]
    made = ["trace", "synth", *shape, f"--steps={STEPS}", f"--layers={LAYERS}", f"--seed={seed}", f"--out={path}"]
    _quietly([*made, f"--routing={chance.choice(('uniform', 'zipf:1.2'))}"])
    layer: Keys = {"model": "custom", "hidden_size": 64, "intermediate_size": 64, "num_experts": experts, "topk": topk}
    layer |= {"shared_experts": shared} if shared else {}
    trace = f"--routing=trace:{path}"
    most = _advice(folder, layer, ranks, trace, f"--tokens={tokens}")["seen"]["most"]
    limit = max(most - chance.randint(1, 3), 1)
    found = _advice(folder, layer, ranks, trace, f"--tokens={tokens}", f"--limit={limit}")
    (yours,) = (one for one in found["candidates"] if "yours" in one["reasons"])
    case = layer | {"ep_size": ranks, "tokens": tokens, "limit": limit, "policy": "unchecked", "numerics": "exact"}
    places = [(step, one) for step in range(STEPS) for one in range(LAYERS)]
    return set(yours["first_steps_above"]), [
        case | {"name": f"r{seed}.{step}.{one}", "routing": f"trace:{path}@{step}.{one}"} for step, one in places
    ]


def _advice(folder: Path, layer: Keys, ranks: int, *more: str) -> dict[str, Any]:
    path = folder / "advice.json"
    shape = [f"--{key.replace('_', '-')}={_text(value)}" for key, value in layer.items()]
    _quietly(["advise", *shape, f"--ep-size={ranks}", f"--max-dispatch-tokens-per-rank={M}", "--steps=8", *more,
              f"--json={path}"])  # fmt: skip
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _quietly(arguments: list[str]) -> None:
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        code = distbench(arguments)
    if code:
        sys.exit(f"distbench {' '.join(arguments)}: exit {code}: {told.getvalue()[-2000:]}")


def _reports(folder: Path, cases: list[Keys], nproc: int) -> Iterable[Report]:
    """Reports of cases, in suites of one launch each."""
    for start in range(0, len(cases), CASES_A_SUITE):
        some = [{**case, "device": "cpu"} for case in cases[start : start + CASES_A_SUITE]]
        yield from run_suite(folder / f"suite{start}", some, [f"--nproc={nproc}"])
        print(f"{start + len(some)} of {len(cases)} cases", flush=True)


def _told(report: Report) -> str:
    reasons = report["reasons"]
    return f"{report['verdict']}: {report['name']}: {reasons[0]['message'][:300] if reasons else ''} {report['case']}"


if __name__ == "__main__":
    sys.exit(main())
