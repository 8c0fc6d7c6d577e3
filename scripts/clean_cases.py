"""False alarms over random clean cases: every result other than PASS is one.

Cases differ in ranks, tokens, shape, top-k, shared and replicated experts, ids of -1, routing, limit, transport,
experts, payload, quantised combine, kernel family, order of slots and seed. They run in suites of 250, each in one
launch. A case that the machine or the shape does not support is counted separately, by its reason. A signal ends it
with the count of what has ended.

With --profiles the cases are of profiles on four ranks, each in turn in bf16 and fp8, so that twelve seeds of six
profiles are one case of each; other flags, such as --caller-wheel, go to the suites. With --share-devices the cases on
devices run where there are fewer devices than ranks, and a half of them with transport symmetric.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from distbench.case.profiles import PROFILES

CASES_A_SUITE = 250
MORI_RANKS = (1, 2, 4, 8)
PROFILE_RANKS = 4
TOKENS = (0, 1, 2, 3, 5, 7, 8, 16, 17, 31, 33, 64)
# Top-k, local experts, hidden and intermediate columns. Each layer compiles its own kernels on a device: any number of
# layers would take minutes a case.
DEVICE_LAYERS = (
    (1, 1, 256, 128), (2, 3, 384, 256), (3, 5, 512, 384), (4, 8, 640, 128), (5, 5, 128, 128), (6, 9, 896, 512),
    (7, 12, 256, 256), (8, 16, 1024, 384),
)  # fmt: skip
Keys = dict[str, Any]


def main() -> int:
    """Run the suites, print the cases that did not pass, and return 1 if there are any."""
    options, flags = _parse()
    counts: collections.Counter[str] = collections.Counter()
    alarms: list[str] = []
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        out = options.out or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="distbench-clean-")))
        for start in range(options.first, options.first + options.cases, CASES_A_SUITE):
            seeds = range(start, min(start + CASES_A_SUITE, options.first + options.cases))
            cases = [_case(seed, options) for seed in seeds]
            lines = run_suite(out / str(start), cases, [f"--nproc={options.nproc}", *flags])
            for line in lines:
                counts[line["verdict"]] += 1
                if line["verdict"] != "PASS":
                    alarms.append(f"{line['verdict']}: {line['name']}: {_first_reason(line)}")
                    print(alarms[-1], flush=True)
            print(f"{sum(counts.values())} of {options.cases} cases, {time.monotonic() - began:.0f} s: "
                  f"{dict(counts)}", flush=True)  # fmt: skip
            if len(lines) < len(seeds):
                break
    unsupported = counts["UNSUPPORTED"]
    print(f"{len(alarms) - unsupported} false alarms in {sum(counts.values()) - unsupported} clean cases, "
          f"{unsupported} unsupported")  # fmt: skip
    missing = options.cases - sum(counts.values())
    return 1 if len(alarms) > unsupported or missing else 0


def _parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=3000, metavar="N", help="cases (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="first seed (default: %(default)s)")
    parser.add_argument("--nproc", type=int, default=8, metavar="P", help="ranks at most (default: %(default)s)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="default: %(default)s")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="keep results here, and go on there when called again"
    )
    parser.add_argument("--share-devices", action="store_true", help="ranks share devices, with --device cuda")
    parser.add_argument("--profiles", default="", metavar="all|NAME,…", help="cases of these profiles (default: none)")
    options, flags = parser.parse_known_args()
    if flags and not options.profiles:
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    options.profiles = list(PROFILES) if options.profiles == "all" else options.profiles.split(",")
    return options, flags


def _case(seed: int, options: argparse.Namespace) -> Keys:
    """Keys of one random case, a function of the seed."""
    chance = random.Random(f"clean case {seed}")  # noqa: S311 - a choice of cases, no secret
    if options.profiles != [""]:
        return _of_profile(chance, seed, options.profiles)
    keys = _parts_on_device(chance, shared=options.share_devices) if options.device == "cuda" else _parts_on_cpu(chance)
    ranks = [count for count in keys.pop("ranks") if count <= options.nproc]
    ep_size = chance.choice(ranks)
    fp8 = chance.random() < 0.4  # noqa: PLR2004 - two fifths of them
    topk, local, hidden, inter = _layer(chance, keys, fp8=fp8, device=options.device)
    tokens = [chance.choice(TOKENS) for _ in range(ep_size)]
    case = keys | {
        "name": f"seed {seed}",
        "expect": "PASS",
        "model": "tiny",
        "ep_size": ep_size,
        "num_experts": local * ep_size,
        "topk": topk,
        "hidden_size": hidden,
        "intermediate_size": inter,
        "tokens": tokens,
        "max_dispatch_tokens_per_rank": 64,
        "prealloc_max_recv_tokens": 0,
        "routing": chance.choice(["uniform", "uniform", "zipf:1.2", "zipf:4", "local", "hot-rank:0", "duplicates"]),
        "limit": chance.choice(["off", "sum32", "sum", "pow2", "max-recv+1"] if any(tokens) else ["off", "sum32"]),
        "dispatch_dtype": "fp8" if fp8 else "bf16",
        "numerics": "both",
        "require": "tolerance",
        "device": options.device,
        "seed": seed,
    }
    return case | _slots(chance, case) if options.device == "cpu" else case


def _slots(chance: random.Random, case: Keys) -> Keys:
    """Shared experts, replicas and ids of -1, each in a quarter of the cases that can have them."""
    found: Keys = {}
    share = 0.25
    if chance.random() < share:
        found["shared_experts"] = chance.randint(1, 2)
    if chance.random() < share and case["routing"] not in ("local", "duplicates"):
        found["physical_experts"] = case["num_experts"] + chance.randint(1, 4) * case["ep_size"]
        found["replica_choice"] = chance.choice(["dynamic", "static"])
    if chance.random() < share and case["experts"] != "aiter":
        found |= {"dropped_slots": chance.choice([0.1, 0.5]), "dropped_tokens": chance.choice([0.0, 0.2])}
    return found


def _of_profile(chance: random.Random, seed: int, profiles: list[str]) -> Keys:
    """A case of a profile; half of them have another cut than the profile's."""
    turn, name = divmod(seed, len(profiles))
    fp8 = turn % 2 == 1
    tokens = [chance.choice(TOKENS) for _ in range(PROFILE_RANKS)]
    topk, granule = chance.randint(1, 8), 256 if fp8 else 128
    hidden = granule * chance.randint(1, 512 // granule)
    cut = chance.choice([{}, {"limit": chance.choice(["off", "sum32", "sum", "pow2", "max-recv+1"])}])
    return cut | {
        "name": f"seed {seed}",
        "expect": "PASS",
        "profile": profiles[name],
        "emulate": True,
        "ep_size": PROFILE_RANKS,
        "model": "tiny",
        "num_experts": chance.randint(topk, 2 * topk) * PROFILE_RANKS,
        "topk": topk,
        "hidden_size": hidden,
        "intermediate_size": granule * chance.randint(1, hidden // granule),
        "tokens": tokens if any(tokens) else [1] * PROFILE_RANKS,
        "max_dispatch_tokens_per_rank": 64,
        "routing": chance.choice(["uniform", "uniform", "zipf:1.2", "zipf:4", "local", "hot-rank:0", "duplicates"]),
        "recv_bound": chance.random() < 0.5,  # noqa: PLR2004 - half of them
        "dispatch_dtype": "fp8" if fp8 else "bf16",
        "cu_count": chance.choice([256, 304]),
        "numerics": "both",
        "require": "tolerance",
        "device": "cpu",
        "seed": seed,
    }


def _parts_on_cpu(chance: random.Random) -> Keys:
    """Transport and experts on the CPU, and the numbers of ranks that they support."""
    keys: Keys = {"transport": chance.choice(["collective", "mori"]), "experts": chance.choice(["reference", "aiter"])}
    keys["emulate"] = "mori" in keys.values() or "aiter" in keys.values()
    keys["ranks"] = range(1, 9)
    if keys["transport"] == "mori":
        keys["ranks"] = MORI_RANKS
        keys["combine_quant"] = chance.choice(["none", "none", "fp8_direct_cast", "fp8_blockwise"])
    keys["fp8_format"], keys["cu_count"] = chance.choice([("e4m3fn", 256), ("e4m3fnuz", 304)])
    keys["slot_order"] = chance.choice(["shuffled", "source"])
    return keys


def _parts_on_device(chance: random.Random, *, shared: bool) -> Keys:
    """Transport and experts on a CUDA device; ranks that share it take either transport."""
    experts = chance.choice(["triton", "triton", "reference"])
    transports = {"share_devices": True, "transport": chance.choice(["collective", "symmetric"])} if shared else {}
    return {
        "transport": "collective",
        "experts": experts,
        "graph": experts == "triton" and chance.random() < 0.2,  # noqa: PLR2004 - a fifth of them
        "ranks": range(1, 9),
    } | transports


def _layer(chance: random.Random, keys: Keys, *, fp8: bool, device: str) -> tuple[int, int, int, int]:
    """Top-k, local experts, hidden and intermediate columns."""
    if device == "cuda":
        return chance.choice(DEVICE_LAYERS)
    topk = chance.randint(1, 8)
    local = chance.randint(topk, 2 * topk)
    return topk, local, *_shape(chance, _granule(keys, fp8=fp8))


def _granule(keys: Keys, *, fp8: bool) -> int:
    """Divisor of both sizes that the payload's scales and the experts' kernels require."""
    if keys["experts"] == "aiter":
        return 256 if fp8 else 64
    return 128 if fp8 else 1


def _shape(chance: random.Random, granule: int) -> tuple[int, int]:
    """Hidden and intermediate columns; at most as many of the latter, so that exact inputs read all of them."""
    if granule > 1:
        hidden = chance.randint(1, 1024 // granule)
        return granule * hidden, granule * chance.randint(1, hidden)
    hidden = chance.choice([9, 16, 40, 64, 100, 256, 384, 515, 1024])
    return hidden, chance.choice(
        [inter for inter in (8, 9, 16, 33, 64, 129, 256, 384) if hidden // 8 <= inter <= hidden]
    )


def run_suite(folder: Path, cases: list[Keys], flags: list[str]) -> list[dict[str, Any]]:
    """Reports of one suite of cases; a case that refuses the suite is left out and counts as unsupported."""
    folder.mkdir(parents=True, exist_ok=True)
    refused: list[dict[str, Any]] = []
    while True:
        path = folder / "suite.json"
        path.write_text(json.dumps({"include": cases}, indent=0))  # a line may have few dots
        code, told = _run([sys.executable, "-m", "distbench", "suite", str(path), *flags, f"--out={folder / 'out'}"])
        journal = folder / "out" / "results.jsonl"
        if journal.exists():
            return refused + [json.loads(line) for line in journal.read_text().splitlines()]
        named = re.search(r"case (seed \d+): (.*)", told)
        if named is None:
            sys.exit(f"the suite of {path} left no results, exit {code}: {told[-2000:]}")
        (case,) = [case for case in cases if case["name"] == named[1]]
        cases = [other for other in cases if other is not case]
        reasons = [{"message": named[2]}]
        refused.append({"name": named[1], "verdict": "UNSUPPORTED", "reasons": reasons, "case": case})


def _run(command: list[str]) -> tuple[int, str]:
    """Exit code and standard error of a suite, which is passed on line by line, as SIGINT and SIGTERM are."""
    told = []
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: process.send_signal(number))
        for line in process.stderr or ():
            print(line, end="", file=sys.stderr, flush=True)
            told.append(line)
    return process.returncode, "".join(told)


def _first_reason(report: dict[str, Any]) -> str:
    reasons = report["reasons"]
    case = {key: value for key, value in report["case"].items() if key in _SHOWN}
    return f"{reasons[0]['message'][:300] if reasons else ''} {json.dumps(case)}"


_SHOWN = ("ep_size", "num_experts", "topk", "shared_experts", "physical_experts", "dropped_slots",
          "dropped_tokens", "hidden_size", "intermediate_size", "tokens", "routing", "limit", "experts",
          "transport", "dispatch_dtype", "combine_quant", "fp8_format", "graph")  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
