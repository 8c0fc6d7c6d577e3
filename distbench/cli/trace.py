"""`distbench trace`: recorded routing: its contents, and conversion of what other programs record."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distbench.cli.argument_types import MOST_RANKS, whole
from distbench.errors import InvalidCase, is_disk_full
from distbench.utils.text import counted

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from distbench.workload.trace_file import Header, Slice

    _Content = tuple[Header, dict[int, NDArray[np.int64]], Iterator[Slice]]

_MOST_EXPERTS = 1 << 17
_MOST_STEPS, _MOST_LAYERS = 1 << 17, 4096


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "trace",
        description="info: show what a recorded routing has. convert: make one of SGLang's per_token recordings (.pt, "
        "one of each rank), of a capture's folder, or of experts as .npy, .safetensors, .csv or .jsonl. "
        "synth: make one of a kind of routing.",
    )
    command.set_defaults(command=_trace)
    command.add_argument(
        "action", choices=("info", "convert", "synth"), metavar="ACTION", help="info, convert or synth"
    )
    command.add_argument(
        "files", metavar="FILE", nargs="*", help="the traces, or the recordings, or a capture's folder"
    )
    command.add_argument("--out", metavar="FILE", default="", help="the trace to write, .safetensors")
    command.add_argument(
        "--ep-size", type=whole(1, MOST_RANKS), default=8, metavar="RANKS", help="ranks (default: %(default)s)"
    )
    command.add_argument(
        "--no-tensors", action="store_true", help="leave out the hidden states that a capture has, which are users'"
    )
    command.add_argument("--num-experts", type=whole(1, _MOST_EXPERTS), metavar="N", help="routed experts")
    synthetic = command.group("synth", "tokens by a kind of routing")
    synthetic.add_argument(
        "--topk", type=whole(1, 64), default=8, metavar="K", help="experts of a token (default: %(default)s)"
    )
    synthetic.add_argument(
        "--tokens", type=whole(1), default=16, metavar="N", help="tokens of each rank (default: %(default)s)"
    )
    synthetic.add_argument(
        "--routing", default="uniform", metavar="PATTERN", help="kind, as in run (default: %(default)s)"
    )
    synthetic.add_argument(
        "--steps", type=whole(1, _MOST_STEPS), default=1, metavar="N", help="steps (default: %(default)s)"
    )
    synthetic.add_argument(
        "--layers", type=whole(1, _MOST_LAYERS), default=1, metavar="N", help="layers (default: %(default)s)"
    )
    synthetic.add_argument(
        "--seed", type=whole(0, 1 << 40), default=0, metavar="N", help="seed of the draw (default: %(default)s)"
    )


def _trace(options: argparse.Namespace) -> int:
    if options.action != "info":
        return _write(options)
    if not options.files:
        message = "trace info: give the trace"
        raise InvalidCase(message)
    for path in options.files:
        if Path(path).is_dir():
            _show_capture(path)
        else:
            _show(path)
    return 0


def _write(options: argparse.Namespace) -> int:
    from distbench.report.files import atomic_file
    from distbench.workload.trace_file import write_trace

    if options.action == "synth" and options.files:
        message = f"trace synth: {options.files[0]!r:.200}: it reads no file; drop it, or use trace convert"
        raise InvalidCase(message)
    captured = options.action == "convert" and len(options.files) == 1 and Path(options.files[0]).is_dir()
    if not options.out.endswith(".safetensors") or (options.num_experts is None and not captured):
        message = f"trace {options.action}: give --out FILE.safetensors and --num-experts N, the routed experts"
        raise InvalidCase(message)
    if options.out in options.files:
        message = f"--out {options.out}: is read as well; name another file"
        raise InvalidCase(message)
    header, tokens, slices = (
        _synthetic(options) if options.action == "synth" else _in_order(*_recorded(options, captured=captured))
    )
    try:
        with atomic_file(Path(options.out), private=bool(header.recorded)) as file:
            write_trace(file, header, tokens, slices)
    except OSError as error:
        if is_disk_full(error):
            raise
        message = f"--out {options.out!r}: cannot be written ({error.strerror}); name another file"
        raise InvalidCase(message) from error
    _show(options.out)
    return 0


def _recorded(options: argparse.Namespace, *, captured: bool) -> tuple[Header, dict[tuple[int, int], Slice]]:
    from distbench.tools.recorded.convert import convert

    if captured:
        return _show_capture(options.files[0], options.out, tensors=not options.no_tensors)
    if not options.files:
        message = "trace convert: give the recordings, a file of each rank where there are several"
        raise InvalidCase(message)
    return convert(options.files, options.num_experts, options.ep_size)


def _in_order(header: Header, slices: dict[tuple[int, int], Slice]) -> _Content:
    """Content of a trace of slices by step and layer."""
    tokens = {step: slices[step, layers[0]].tokens for step, layers in header.steps.items()}
    places = [(step, layer) for step, layers in header.steps.items() for layer in layers]
    return header, tokens, (slices[place] for place in places)


def _synthetic(options: argparse.Namespace) -> _Content:
    import numpy as np

    from distbench.tools.recorded.synthetic import drawn, header_of
    from distbench.workload.routing_spec import ExpertGroup, parse_routing
    from distbench.workload.trace_file import Slice

    group = ExpertGroup(options.ep_size, options.num_experts, options.topk)
    shape = (options.steps, options.layers, options.tokens)
    what = (parse_routing(options.routing), group, shape, options.seed)
    header, tokens = header_of(*what), np.full(group.ep_size, options.tokens, dtype=np.int64)
    return header, dict.fromkeys(header.steps, tokens), (Slice(ids, tokens) for ids in drawn(*what))


def _show_capture(folder: str, out: str = "", *, tensors: bool = True) -> tuple[Header, dict[tuple[int, int], Slice]]:
    """Show what a capture has and what it lacks; return its header and slices, which `out` will have."""
    from distbench.report.terminal import print_table, print_text
    from distbench.tools.recorded.captured import read_capture

    header, slices, violations, notes = read_capture(folder, tensors=tensors)
    if not out:
        _show_slices(folder, header, slices.__getitem__)
    for note in notes:
        print_text(f"{folder}: {note}")
    if violations:
        print_text(f"{folder}: {len(violations)} times a rank received more rows than its limit; the first are")
        rows = [tuple(map(str, one)) for one in violations[:_SHOWN_STEPS]]
        print_table(rows, ("step", "layer", "rank", "total_recv", "limit"))
    whole = [one for one in violations if (one.step, one.layer) in slices]
    if whole:
        worst = max(whole, key=lambda one: ((one.step, one.layer) in header.recorded, one.total_recv - one.limit))
        tokens = ",".join(map(str, slices[worst.step, worst.layer].tokens.tolist()))
        place = f"{out or 'TRACE'}@{worst.step}.{worst.layer}"
        print_text(
            f"the worst again, with your --model: distbench run -n {header.ep_size} --routing trace:{place} "
            f"--tokens {tokens} --limit {worst.limit} --policy unchecked --bundle bundles{_with_tensors(header)}"
        )
    return header, slices


def _with_tensors(header: Header) -> str:
    """Flags of a run with the recorded hidden states, which gaussian inputs have."""
    return "" if header.hidden in ("", "bf16") else " --dispatch-dtype fp8"


def _show(path: str) -> None:
    from distbench.workload.trace_file import open_trace, read_header, read_slice, read_tensors

    header, opened = read_header(path), open_trace(path)
    for step, layer in sorted(header.recorded):
        read_tensors(header, step, layer, len(read_slice(header, step, layer, opened).ids))  # refused, if damaged
    _show_slices(path, header, lambda place: read_slice(header, *place, opened))


def _show_slices(path: str, header: Header, slice_of: Callable[[tuple[int, int]], Slice]) -> None:
    from distbench.report.terminal import print_table, print_text

    layers = sorted({layer for known in header.steps.values() for layer in known})
    weights = ", with weights" if header.weighed else ""
    if header.recorded:
        step, layer = min(header.recorded)
        weights += (
            f", {len(header.recorded)} with the {header.hidden} hidden states of users' tokens, "
            f"{counted(header.hidden_size, 'column')} (@{step}.{layer} is the first)"
        )
    shape = f"{counted(header.num_experts, 'expert')}, top-{header.topk}, {counted(header.ep_size, 'rank')}"
    span = f"{layers[0]} to {layers[-1]}" if len(layers) > 1 else f"{layers[0]}"
    extent = f"{counted(len(header.steps), 'step')}, {counted(len(layers), 'layer')} ({span})"
    print_text(f"{path}: {shape}; {extent}{weights}; from {header.source or 'no file named'}")
    rows = []
    for step in list(header.steps)[:_SHOWN_STEPS]:
        slices = [(layer, slice_of((step, layer))) for layer in header.steps[step]]
        even = header.num_experts % header.ep_size == 0
        most = max(((int(one.received(header.num_experts).max()), layer) for layer, one in slices), default=(0, 0))
        tokens = slices[0][1].tokens
        told = (str(most[0]), str(most[1])) if even else ("", "")
        rows.append((str(step), str(int(tokens.sum())), str(int(tokens.max())), *told))
    print_table(rows, ("step", "tokens", "most of a rank", "fullest total_recv", "in layer"))


_SHOWN_STEPS = 8
