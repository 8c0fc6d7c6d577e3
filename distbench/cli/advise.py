"""`distbench advise`: which limit for a deployment: proven, seen and by chance, from counts alone."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distbench.cli.argument_types import MOST_RANKS, whole
from distbench.cli.launcher_tasks import tell_task
from distbench.cli.options import (
    add_case_options,
    add_folder,
    add_json,
    add_voice,
    case_flags,
    json_on_standard_output,
    output_of,
)
from distbench.cli.torchrun_rank import alone
from distbench.errors import DistbenchError, InvalidCase, is_disk_full
from distbench.utils.text import counted

if TYPE_CHECKING:
    from distbench.case.resolve import Layer
    from distbench.case.spec import Case
    from distbench.tools.advise.advice import Advice
    from distbench.tools.advise.batches import Limits, Steps
    from distbench.tools.advise.question import Question
    from distbench.tools.advise.recording import Recording
    from distbench.tools.advise.routing import Model

_KEYS = (
    *("profile", "model", "hidden_size", "intermediate_size", "num_experts", "topk", "tokens", "routing", "seed"),
    *("limit", "max_dispatch_tokens_per_rank", "prealloc_max_recv_tokens", "sglang_version", "dispatch_dtype"),
    *("kernel_table", "cu_count", "aiter_version", "aiter_ksplit", "aiter_bypass_tune", "activation"),
    *("doweight_stage1", "two_batch_overlap", "tp_size", "shared_experts", "physical_experts", "placement"),
)
_LAUNCH = ("transport", "experts", "emulate", "device", "share_devices", "iterations", "warmup")
"""Keys of --measure alone."""
_ITERATIONS = 50
_MOST_STEPS = 1 << 22
_MOST_LAYERS = 4096


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "advise",
        description="Say which limit is proven for a deployment, what its traffic reaches, with what chance a step "
        "exceeds a smaller one, and which kernel each limit selects. Needs no GPU and draws no tokens.",
    )
    command.set_defaults(command=_advise)
    command.add_argument(
        "--ep-size", type=whole(1, MOST_RANKS), default=8, metavar="RANKS", help="ranks (default: %(default)s)"
    )
    command.add_argument("--nodes", type=whole(1, MOST_RANKS), default=0, metavar="NODES", help="nodes of the ranks")
    command.add_argument(
        "--batches",
        metavar="STEPS",
        default="",
        help="tokens of each rank by step: uniform:LOW-HIGH, poisson:MEAN, a table with step, rank and tokens (.csv, "
        ".json, .jsonl), or a log of SGLang's scheduler (.log); default: every rank has all its tokens",
    )
    command.add_argument("--phase", choices=("decode", "prefill"), default="decode", help="batches of a log")
    command.add_argument("--histogram", metavar="FILE", default="", help="loads of the experts, .json or .npy")
    command.add_argument(
        "--layers", type=whole(1, _MOST_LAYERS), metavar="N", help="MoE layers (default: the preset's)"
    )
    command.add_argument(
        "--steps", type=whole(1, _MOST_STEPS), default=10_000, metavar="N", help="default: %(default)s"
    )
    command.add_argument("--chance", type=_chance, default=1e-9, metavar="P", help="of a step (default: %(default)s)")
    measured = command.group("measure", "times of the limits")
    measured.add_argument(
        "--measure",
        action="store_true",
        help="run the layer at each limit on this machine, and put its times beside them",
    )
    add_folder(command)
    output_of(command).add_argument(
        "--cases", metavar="DIR", default="", help="write case files that show what is proven"
    )
    output_of(command).add_argument(
        "--html", metavar="FILE", default="", help="write a page with the distribution of the rows and the limits"
    )
    add_json(command, "the advice")
    add_voice(command)
    add_case_options(command, (*_KEYS, *_LAUNCH))


def _advise(options: argparse.Namespace) -> int:
    from distbench.tools.advise.advice import advise
    from distbench.tools.advise.batches import Limits, full_steps, read_steps
    from distbench.tools.advise.case_files import write_case_files
    from distbench.tools.advise.kernels import Kernels
    from distbench.tools.advise.text import print_advice
    from distbench.utils.signals import Interrupted

    if options.html and options.html == options.json:
        message = f"--html and --json: {options.html!r:.200} would hold the latter alone; name two files"
        raise InvalidCase(message)
    made: list[Advice] = []
    with json_on_standard_output(options.json, lambda: made[0]):
        question, own_tokens = _question(options)
        case = question.case
        name = "--tokens" if own_tokens else "max_dispatch_tokens_per_rank"
        limits = Limits(case.ep_size, case.tokens, name)
        recording = _recording(options, question, limits)
        steps: Steps = (
            read_steps(options.batches, limits, options.steps, case.seed, options.phase)
            if options.batches
            else recording.steps
            if recording
            else full_steps(case.tokens, options.steps)
        )
        model = recording.model if recording else _model(options, question)
        question = question._replace(layers=len(model.layers))
        kernels, rows = Kernels(question.case), None if options.batches else recording
        advice = advise(question, steps, model, kernels, _notes(question), rows)
        made.append(advice)
        failed: BaseException | None = None
        if options.measure:
            try:
                made[0] = advice = _measured(options, question, advice)
            except (DistbenchError, Interrupted) as error:  # the advice stands without times
                failed = error
        print_advice(advice)
        if options.cases:
            _print_paths(write_case_files(options.cases, question, advice.bound))
        _write_json(options.json, advice)
        _write_page(options.html, advice)
    if failed is not None:
        raise failed
    return 0


def _measured(options: argparse.Namespace, question: Question, advice: Advice) -> Advice:
    import msgspec

    from distbench.case.resolve import Layer, resolve_case
    from distbench.cli.launching import hold_lab
    from distbench.launcher.preflight import check_folder
    from distbench.tools.advise.measured import measured

    alone("advise --measure")
    tell_task()
    flags = case_flags(options)
    timed = Layer("advise", {"iterations": _ITERATIONS, "numerics": "exact"})
    asked = resolve_case([*flags, timed], options.ep_size, fit=False)
    keys = {key: getattr(asked.case, key) for key in (*_LAUNCH, "iterations", "numerics")}
    case = msgspec.structs.replace(question.case, **keys)
    check_folder(options.out)
    with hold_lab(options) as lab:
        lab.work = "advise: the layer at each limit"
        return measured(advice, case, lab)


def _question(options: argparse.Namespace) -> tuple[Question, bool]:
    """The question of the options, and whether they give the tokens of a rank."""
    import msgspec

    from distbench.case.environment import read_environment
    from distbench.case.limits import Traffic, resolve_limit
    from distbench.case.presets import PRESETS
    from distbench.case.resolve import resolve_case
    from distbench.tools.advise.hits import placement_of
    from distbench.tools.advise.question import Question

    flags = _without_launch(case_flags(options), options)
    environment = [layer for layer in read_environment(os.environ, flags) if not layer.unsupported]
    resolved = resolve_case([*flags, *environment], options.ep_size, fit=False)
    case, own_tokens = resolved.case, resolved.sources["tokens"] != "default"
    if not own_tokens:
        case = msgspec.structs.replace(case, tokens=(case.max_dispatch_tokens_per_rank,) * case.ep_size)
    _check(case, options)
    rows = Traffic(case.tokens, (0,) * case.ep_size, case.capacity)
    asked = resolved.sources["limit"] != "default"
    if asked and case.limit.startswith("max-recv"):
        message = (
            f"limit = {case.limit}: the rows received are not known before a run; give a number, sum32 or capacity"
        )
        raise InvalidCase(message)
    known = PRESETS.get(case.model)
    layers = options.layers or (known.layers if known else 1)
    limit = (resolve_limit(case.limit, rows) or case.capacity) if asked else None
    return Question(case, placement_of(case), layers, limit, options.nodes, options.chance), own_tokens


def _without_launch(flags: list[Layer], options: argparse.Namespace) -> list[Layer]:
    """Flags without those that are for the runs of --measure alone.

    Raises:
        InvalidCase: one is given without --measure.

    """
    import msgspec

    launch = [key for layer in flags for key in layer.values if key in _LAUNCH]
    if launch and not options.measure:
        message = (
            f"--{launch[0].replace('_', '-')}: for runs that --measure starts; give --measure too, or leave it out"
        )
        raise InvalidCase(message)
    kept = ({key: value for key, value in layer.values.items() if key not in _LAUNCH} for layer in flags)
    return [msgspec.structs.replace(layer, values=values) for layer, values in zip(flags, kept, strict=True)]


def _check(case: Case, options: argparse.Namespace) -> None:
    """Refuse values that do not fit together."""
    from distbench.case.resolve import check_fit
    from distbench.workload.routing_spec import check_routing, parse_routing, slots_of

    check_fit(case)
    routing = parse_routing(case.routing)
    if routing.trace is None:
        check_routing(routing, slots_of(case).group, slots_of(case))
    over = max(case.tokens)
    if over > case.max_dispatch_tokens_per_rank:
        message = (
            f"tokens = {over}: above max_dispatch_tokens_per_rank = {case.max_dispatch_tokens_per_rank}, which MoRI "
            "does not check; give --max-dispatch-tokens-per-rank, or fewer tokens"
        )
        raise InvalidCase(message)
    if options.nodes and case.ep_size % options.nodes:
        message = f"--nodes {options.nodes}: does not divide {counted(case.ep_size, 'rank')}; give a divisor of them"
        raise InvalidCase(message)


def _recording(options: argparse.Namespace, question: Question, limits: Limits) -> Recording | None:
    """The recorded routing that the question names; None for another kind, or with --histogram."""
    from distbench.tools.advise.recording import read_recording
    from distbench.workload.routing_spec import parse_routing

    trace = parse_routing(question.case.routing).trace
    if trace is None or options.histogram:
        return None
    case = question.case
    recording = read_recording(trace, case.topk, question.placement, own=case.shared_experts > 0)
    most, fits = int(recording.steps.mosts.max()), max(limits.most)
    if most > fits:
        message = (
            f"routing = {trace}: a rank has {counted(most, 'token')} in a step, above {limits.name} = {fits}; raise it"
        )
        raise InvalidCase(message)
    return recording


def _model(options: argparse.Namespace, question: Question) -> Model:
    from distbench.tools.advise.routing import histogram_model, synthetic_model
    from distbench.workload.routing_spec import parse_routing

    case = question.case
    if options.histogram:
        return histogram_model(options.histogram, case.topk, question.placement, question.layers)
    routing = parse_routing(case.routing)
    return synthetic_model(routing, case.topk, question.placement, question.layers, case.seed)


def _notes(question: Question) -> list[str]:
    """Cut of SGLang's own receive bound for full batches, where it has one or why not."""
    import msgspec

    from distbench.errors import Unsupported
    from distbench.pipeline.recv_bound import recv_bound

    case = msgspec.structs.replace(question.case, recv_bound=True, limit="off", sender_rows="")
    try:
        bound = recv_bound(case, case.ep_size // question.nodes if question.nodes else None)
    except (InvalidCase, Unsupported) as error:
        return [f"SGLang's own receive bound: {error}"]
    told = (
        f"cuts at {counted(bound.rows, 'row')} for full batches"
        if bound.rows is not None
        else f"cuts nothing: {bound.reason}"
    )
    return [f"SGLANG_MORI_RECV_BOUND, with no limit set, {told}"]


def _chance(text: str) -> float:
    try:
        chance = float(text)
    except ValueError:
        chance = float("nan")
    if not 0 < chance < 1:
        message = f"{text!r:.40} is refused; allowed are numbers between 0 and 1, such as 1e-9"
        raise argparse.ArgumentTypeError(message)
    return chance


def _print_paths(paths: list[Any]) -> None:
    from distbench.report.terminal import print_text

    print_text(f"case files: {', '.join(map(str, paths))}")


def _write_json(path: str, advice: Advice) -> None:
    import msgspec

    if path and path != "-":
        _write("--json", path, msgspec.json.format(msgspec.json.encode(advice), indent=2) + b"\n")


def _write_page(path: str, advice: Advice) -> None:
    if path:
        from distbench.tools.advise.page import page_of

        _write("--html", path, page_of(advice).encode("utf-8", "replace"))


def _write(option: str, path: str, content: bytes) -> None:
    from distbench.report.files import write_atomically
    from distbench.utils.text import why

    try:
        write_atomically(Path(path), content)
    except (OSError, ValueError) as error:
        if is_disk_full(error):
            raise
        message = f"{option} {path!r:.200}: cannot be written ({why(error)}); name another file"
        raise InvalidCase(message) from error
