"""`distbench tune`: a table of the fastest Triton kernels for one layer on this GPU."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from distbench.case.presets import PRESETS
from distbench.cli.argument_types import MOST_RANKS, plain_counts, whole
from distbench.cli.launcher_tasks import tell_task
from distbench.cli.options import add_voice
from distbench.errors import InvalidCase, Unsupported
from distbench.report.progress import Meter
from distbench.report.terminal import print_line, print_note
from distbench.utils.process import usable_cores
from distbench.utils.voice import Voice, voice

if TYPE_CHECKING:
    from distbench.experts.triton.config import LayerShape
    from distbench.experts.triton.table import Table

_BUCKETS = ",".join(str(1 << power) for power in range(16))


def add(commands: Any) -> None:
    """Add the command to the parser."""
    tune = commands.add_parser(
        "tune",
        description="Try kernels for each bucket of row counts, keep the fastest of those that give the oracle's bits. "
        "The table is written after each bucket: the same command resumes where it was stopped. Use it with "
        "--experts triton --kernel-table FILE.",
    )
    tune.set_defaults(command=_tune, resumes="the same command resumes")
    tune.add_argument(
        "--model", choices=sorted(PRESETS), default="deepseek-v3", metavar="NAME", help="layer (default: %(default)s)"
    )
    ranks, processes = whole(1, MOST_RANKS), whole(1)
    tune.add_argument(
        "--ep-size", type=ranks, default=8, metavar="RANKS", help="ranks that share it (default: %(default)s)"
    )
    tune.add_argument("--dispatch-dtype", choices=("bf16", "fp8"), default="bf16", help="rows (default: %(default)s)")
    tune.add_argument("--stage2", choices=("reduce", "atomic"), default="reduce", help="sum (default: %(default)s)")
    tune.add_argument("--buckets", default=_BUCKETS, metavar="ROWS", help="row counts (default: 1,2,4,...,32768)")
    tune.add_argument(
        "--processes",
        type=processes,
        default=usable_cores(),
        metavar="PROCESSES",
        help="compilers side by side, at most",
    )
    add_voice(tune)
    tune.add_argument("--table", metavar="FILE", default="", help="the table (default: its own name, here)")


def _tune(options: argparse.Namespace) -> int:
    from distbench.experts.triton.table import load_table

    tell_task()
    shape, buckets = _shape(options), _buckets(plain_counts(options.buckets))
    table = _empty(shape)
    path = Path(options.table or table.file_name)
    if path.exists():
        known = load_table(path)
        if msgspec.structs.replace(known, rows=[]) != table:
            message = f"table {path}: made for another layer, device or version; name another file, or remove it"
            raise InvalidCase(message)
        _refuse_other_modes(known, path, options.stage2)
        table = known
    missing = [bucket for bucket in buckets if bucket not in {row.bucket for row in table.rows}]
    if missing:
        table = _fill(table, shape, missing, options, path)
    print_line(f"{path}: {len(table.rows)} buckets")
    return 0


def _refuse_other_modes(table: Table, path: Path, stage2: str) -> None:
    others = sorted({row.config.mode for row in table.rows} - {stage2})
    if others:
        message = (
            f"table {path}: has rows whose stage 2 is {others[0]}, and --stage2 is {stage2}; name another file with "
            "--table, or remove it"
        )
        raise InvalidCase(message)


def _fill(table: Table, shape: LayerShape, buckets: list[int], options: argparse.Namespace, path: Path) -> Table:
    from distbench.experts.triton.cluster_products import is_hopper
    from distbench.experts.triton.table import encode_table
    from distbench.report.files import write_atomically
    from distbench.tools.tune.candidates import families
    from distbench.tools.tune.compilers import compile_all
    from distbench.tools.tune.tuner import Tuner

    tried = {bucket: families(shape, bucket, options.stage2, clusters=is_hopper()) for bucket in buckets}
    configs = (config for some in tried.values() for one in some for config in one.configs())
    with Meter("tune") as meter:
        note = partial(_note, meter)
        compile_all(shape, configs, options.processes, note)
        tuner = Tuner(shape, note, lambda text: print_note(f"tune: {text}"))
        for done, bucket in enumerate(buckets):
            meter.also = f"bucket {done + 1} of {len(buckets)}"
            row = tuner.tune(bucket, tried[bucket])
            table = msgspec.structs.replace(table, rows=sorted([*table.rows, row], key=lambda one: one.bucket))
            write_atomically(path, encode_table(table))
            if voice() is not Voice.QUIET:
                print_line(f"{bucket:>6} rows {row.us:9.1f} us  {row.config.name1}  {row.config.name2}")
    return table


def _note(meter: Meter, what: str, done: int, total: int) -> None:
    if done < meter.done or total != meter.total:
        meter.restart()
    meter.now, meter.done, meter.total = what, done, total


def _shape(options: argparse.Namespace) -> LayerShape:
    from distbench.experts.triton.config import LayerShape

    model = PRESETS[options.model]
    num_experts = model.experts_for(options.ep_size)
    if num_experts % options.ep_size:
        message = f"--ep-size {options.ep_size}: must divide the {num_experts} experts of {options.model}"
        raise InvalidCase(message)
    return LayerShape(
        num_experts=num_experts,
        num_local_experts=num_experts // options.ep_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        topk=model.topk,
        quant=options.dispatch_dtype,
    )


def _buckets(text: str) -> list[int]:
    from distbench.experts.selection.releases import padded_rows

    try:
        rows = [int(part) for part in text.split(",")]
    except ValueError as error:
        message = f"--buckets {text!r:.80}: give row counts such as 64,256"
        raise InvalidCase(message) from error
    wrong = [one for one in rows if padded_rows(one) != one]
    if wrong:
        message = f"--buckets: {wrong[0]} is no bucket, it falls into {padded_rows(wrong[0])}"
        raise InvalidCase(message)
    return rows


def _empty(shape: LayerShape) -> Table:
    from importlib import metadata

    import torch

    from distbench.experts.triton.table import Table

    if not torch.cuda.is_available():
        message = "tune: torch sees no GPU; tune on the machine whose kernels are to be chosen"
        raise Unsupported(message)
    return Table(
        device=torch.cuda.get_device_name(),
        num_local_experts=shape.num_local_experts,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        topk=shape.topk,
        quant=shape.quant,
        num_experts=shape.num_experts,
        versions={name: metadata.version(name) for name in ("torch", "triton")},
    )
