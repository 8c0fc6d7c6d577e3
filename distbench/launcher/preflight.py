"""Checks before any rank starts, each with its fix. Loads no torch."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import msgspec

from distbench.case.aiter_env import table_paths
from distbench.case.kinds import inputs_of
from distbench.case.limits import Traffic, resolve_limit
from distbench.case.resolve import check_fit
from distbench.case.sglang_releases import rules_of
from distbench.case.spec import Case
from distbench.errors import InvalidCase, Unsupported
from distbench.experts import make_selector
from distbench.experts.aiter.package import check_available, check_quirks
from distbench.experts.coverage import plan_of
from distbench.experts.formulas import check_triton_formula
from distbench.experts.selection.choice import KernelSelector, TunedKey, rules_for
from distbench.experts.selection.table_match import match_tables
from distbench.experts.shapes import check_aiter_shape, check_triton_shape
from distbench.experts.triton.table import load_table, selector_for, shape_of
from distbench.pipeline.recv_bound import parse_sender_rows, recv_bound
from distbench.transport.mori.config import check_environment, heap_size, mori_warnings, plan_mori
from distbench.transport.mori.emulated.quirks import parse_quirks
from distbench.utils.amd_arch import arch_of, fp8_format
from distbench.utils.devices import compute_units, count_devices, devices_to_hold, interpreted
from distbench.utils.variables import shares_memory
from distbench.workload.routing_spec import (
    check_recorded_tensors,
    check_recorded_tokens,
    check_routing,
    parse_routing,
    slots_of,
)

_LITTLE_BYTES = 64 << 10
_INTERPRETER, _STAND_IN = "TRITON_INTERPRET=1", "--emulate"
_ON_CPU = {"symmetric": _INTERPRETER, "triton": _INTERPRETER, "mori": _STAND_IN, "aiter": _STAND_IN}
"""Transports and experts for GPUs: what else they need on the CPU."""


def check_case(case: Case, local_ranks: int | None = None) -> tuple[str, ...]:
    """Warnings about a valid case, in a launch of `local_ranks` on each node; None: all ranks are on one node.

    Raises:
        InvalidCase: inputs that cannot be made, an unreadable kernel table, a configuration that MoRI gets wrong, or a
            variable of distbench with another value than allowed.
        Unsupported: a package that the case needs is missing.

    """
    check_fit(case)
    shares_memory(os.environ)
    _check_unused(case)
    if not any(case.tokens):  # no rank receives a row, which is known before a launch
        resolve_limit(case.limit, Traffic(case.tokens, (0,) * case.ep_size, case.capacity))
    routing = parse_routing(case.routing)
    slots = slots_of(case)
    check_routing(routing, slots.group, slots)
    check_recorded_tokens(routing, case.tokens)
    check_recorded_tensors(case)
    if "exact" in inputs_of(case):
        plan_of(case)
    notes = _check_mori(case, local_ranks) if case.transport == "mori" else ()
    notes = (*notes, *_check_bound(case, local_ranks))
    if case.uses_fp8:
        _check_fp8(case)
    _check_overlap(case)
    _check_sharing(case)
    _check_graph(case)
    _check_layer_graph(case)
    _check_caller(case)
    if case.inject:
        from distbench.faults.injector import check_faults  # noqa: PLC0415 - loads torch, which other cases do without

        check_faults(case)
    if case.experts == "triton":
        check_triton_formula(case)
        check_triton_shape(case.hidden_size, case.intermediate_size, 1 if case.dispatch_dtype == "fp8" else 2)
        return (*notes, *_check_triton_table(case))
    if case.experts == "aiter":
        check_available(case)
        check_aiter_shape(case.hidden_size, case.intermediate_size, case.dispatch_dtype)
    units = _compute_units(case)
    selector = make_selector(msgspec.structs.replace(case, cu_count=units or case.cu_count))
    if not case.kernel_table or selector.tuned:
        return notes
    return (*notes, _untuned(case, selector, assumed=units is None))


def _check_unused(case: Case) -> None:
    """Refuse values that cannot be parsed, also where the case's transport, experts or limit do not use them."""
    try:
        parse_quirks(case.mori_habits)
    except ValueError as error:
        message = f"mori_habits = {case.mori_habits!r:.80}: {error}"
        raise InvalidCase(message) from error
    check_quirks(case)
    rules_for(case.aiter_version)
    parse_sender_rows(case)


def _check_bound(case: Case, local_ranks: int | None) -> tuple[str, ...]:
    """Warnings where SGLang's receive bound cuts nothing, or is that of older releases, for decode batches only."""
    rule = rules_of(case.sglang_version).recv_bound
    if case.limit_key != "recv_bound":
        named = ("tp_size", "sender_rows")
        inert = [name for name in named if getattr(case, name)]
        return (f"{', '.join(inert)}: used by recv_bound with the limit off alone",) if inert else ()
    bound = recv_bound(case, local_ranks)
    if bound.rows is None:
        return (f"recv_bound: nothing is cut, as in production: {bound.reason}",)
    if rule == "routes":
        return (f"recv_bound: SGLang {case.sglang_version} cuts at tokens times top-k, in decode batches only",)
    return ()


def _check_overlap(case: Case) -> None:
    """Refuse what two-batch overlap does not do here: policy guard, CUDA graphs, and callers without it."""
    if not case.two_batch_overlap:
        return
    refused = {
        "policy = guard": case.policy == "guard",
        "graph": case.graph,
        f"caller = {case.caller}": case.caller not in ("own", "sglang"),
    }
    for what, asked in refused.items():
        if asked:
            message = f"two_batch_overlap: not with {what}; drop one of them"
            raise Unsupported(message)


def _check_sharing(case: Case) -> None:
    """Refuse shared devices without a device, and with MoRI, whose ranks have one each."""
    if case.share_devices and case.device == "cpu":
        message = "share_devices: device = cpu has none to share; drop one of them"
        raise InvalidCase(message)
    if case.share_devices and case.transport == "mori" and not case.emulate:
        message = "share_devices with transport mori: its ranks have a device each; use --transport symmetric"
        raise Unsupported(message)


def _check_caller(case: Case) -> None:
    """Refuse a caller whose package is missing, or whose release lacks a definition that is lifted."""
    if case.caller == "own":
        return
    from distbench.callers import check_caller  # noqa: PLC0415 - nothing of it is loaded without a caller

    check_caller(case)


def _untuned(case: Case, selector: KernelSelector, *, assumed: bool) -> str:
    layer = selector.layer
    units = f"{layer.cu_count} (assumed: this node has no ROCm device)" if assumed else str(layer.cu_count)
    return (
        f"kernel_table = {case.kernel_table}: no row for cu_num {units}, model_dim {layer.model_dim}, "
        f"inter_dim {layer.inter_dim}, expert {layer.num_local_experts}, topk {layer.lookup_topk(selector.rules)} "
        f"and {layer.quant}; all kernels come from heuristics{_nearest(case, selector)}"
    )


def _nearest(case: Case, selector: KernelSelector) -> str:
    """Difference to the nearest row, from the first table that has rows at all; empty for none."""
    key = TunedKey.for_layer(selector.layer, selector.rules)
    matches = match_tables(table_paths(case.kernel_table), key, selector.rules)
    return next((f"; the nearest row differs in {one.nearest}" for one in matches if one.nearest), "")


def _compute_units(case: Case) -> int | None:
    """Compute units that kernels are selected for: the case's, or with the real aiter this node's."""
    return compute_units() if case.experts == "aiter" and not case.emulate else case.cu_count


def _check_fp8(case: Case) -> None:
    """Refuse a format for which the emulated device has no kernels, or that the Triton kernels do not support."""
    own = fp8_format(arch_of(case.cu_count))
    if case.emulate and case.fp8_format != own and (case.transport == "mori" or case.experts == "aiter"):
        message = (
            f"fp8_format = {case.fp8_format}: the emulated device has {case.cu_count} compute units, so it is a "
            f"{arch_of(case.cu_count)}, whose kernels have {own}; use that, or another cu_count"
        )
        raise Unsupported(message)
    if case.experts == "triton" and case.dispatch_dtype == "fp8" and case.fp8_format == "e4m3fnuz":
        message = (
            "fp8_format = e4m3fnuz with experts triton: their kernels compute e4m3fn, the fp8 of Hopper; use bf16, or "
            "e4m3fn (emulated: with --cu-count 256)"
        )
        raise Unsupported(message)


def _check_graph(case: Case) -> None:
    if case.graph and case.policy == "guard":
        message = (
            "graph with policy guard: guard reads total_recv on the host to choose the rows, and a graph's rows are "
            "fixed when it is captured; use strict or unchecked"
        )
        raise Unsupported(message)
    if case.graph and case.device == "cpu":
        message = "graph: CUDA graphs need a device, and device = cpu; drop --graph or use --device cuda"
        raise Unsupported(message)
    if case.graph and case.experts == "reference":
        message = "graph with experts reference: they read the live-row count on the host, which no capture allows"
        raise Unsupported(message)


def _check_layer_graph(case: Case) -> None:
    """Refuse parts whose calls a graph of the whole layer cannot hold."""
    if case.graph != "layer":
        return
    reasons = {
        "transport collective": case.transport == "collective"
        and "it sends rows by the counts of the agreed routing, which are the host's; use --transport symmetric",
        "transport mori, emulated": case.transport == "mori" and case.emulate and "the stand-in works on the host",
        "inject": case.inject and "a replay calls no fault: use --graph experts",
    }
    for what, reason in reasons.items():
        if reason:
            message = f"graph = layer with {what}: {reason}"
            raise Unsupported(message)


def adds_atomically(case: Case) -> bool:
    """Whether the padded arm's kernel adds routes atomically, in an order that changes from run to run.

    For the Triton experts only the case's own table counts, not one selected by device.
    """
    if case.experts == "triton":
        return selector_for(case, "").choose(case.capacity).stage2_mode == "atomic"
    selector = make_selector(msgspec.structs.replace(case, cu_count=_compute_units(case) or case.cu_count))
    return selector.choose(case.capacity).stage2_mode == "atomic"


def check_devices(cases: Iterable[Case], local_ranks: int, available: int | None = None) -> tuple[str, ...]:
    """Names of the devices that a launch of `local_ranks` on this machine takes; empty on the CPU alone.

    `available` is the number of devices; None queries the machine, where a case needs one.

    Raises:
        Unsupported: a case needs more devices than there are, or a graph with too few devices.

    """
    listed = list(cases)
    if all(case.device == "cpu" for case in listed):
        return ()
    found = count_devices() if available is None else available
    held: tuple[str, ...] = ()
    for shared in (False, True):
        asked = sorted({case.device for case in listed if case.share_devices == shared})
        try:
            held = max(held, devices_to_hold(asked, local_ranks, found, shared=shared), key=len)
        except Unsupported as error:
            message = "; ".join([str(error), *_needs_on_cpu(listed)])
            raise Unsupported(message) from error
    if not held and any(case.graph for case in listed):
        message = f"graph: CUDA graphs need a device for each of {local_ranks} ranks, torch sees {found}"
        raise Unsupported(message)
    return held


def _needs_on_cpu(cases: Iterable[Case]) -> list[str]:
    """Needs, on the CPU, of the cases' parts that are for GPUs, each once."""
    found: dict[str, None] = {}
    for case in cases:
        met = {_INTERPRETER: interpreted(), _STAND_IN: case.emulate}
        for kind, name in (("transport", case.transport), ("experts", case.experts)):
            need = _ON_CPU.get(name)
            if need and not met[need]:
                found[f"on the CPU {kind} {name} needs {need}"] = None
    return list(found)


def _check_mori(case: Case, local_ranks: int | None) -> tuple[str, ...]:
    if not case.emulate and find_spec("mori") is None:
        message = (
            "transport mori: no package mori here; install amd-mori on a ROCm machine (docs/mori.md), or add --emulate"
        )
        raise Unsupported(message)
    check_environment(os.environ)
    plan = plan_mori(case, os.environ, local_ranks)
    if case.emulate and case.launch_mode == "MANUAL" and plan.launch.blocks > case.cu_count:
        message = (
            f"{plan.kernel}: {plan.launch.blocks} blocks have to run at once, the emulated device has {case.cu_count} "
            "compute units; use another cu_count, or IntraNode with SGLang 0.5.21 or later, which clamps its grid"
        )
        raise Unsupported(message)
    heap_size(plan, os.environ, emulated=case.emulate)
    return mori_warnings(plan, os.environ, emulated=case.emulate)


def _check_triton_table(case: Case) -> tuple[str, ...]:
    if not case.kernel_table:
        return ()
    table, shape = load_table(case.kernel_table), shape_of(case)
    if table.answers(shape):
        return ()
    return (f"kernel_table = {case.kernel_table}: not for {shape}; all kernels come from heuristics",)


def check_path(path: str) -> None:
    """Refuse a path that is not UTF-8, since reports are, and a device or pipe: a file written whole would replace it.

    Raises:
        InvalidCase: not UTF-8, or neither a file nor a folder.

    """
    try:
        path.encode()
    except UnicodeEncodeError as error:
        message = f"path {path!r}: not UTF-8, which reports are written in; name another one"
        raise InvalidCase(message) from error
    found = Path(path)
    if found.exists() and not (found.is_file() or found.is_dir()):
        message = f"path {path!r:.200}: a device or pipe, which a report would replace; name a file"
        raise InvalidCase(message)


def check_folder(out: str, needed: int = _LITTLE_BYTES) -> None:
    """Make the folder for results and prove that it has room for `needed` bytes.

    Raises:
        InvalidCase: it cannot be made or written, or its disk is nearly full.

    """
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as probe:
            probe.write(b"\0" * 4096)
        free = shutil.disk_usage(out).free
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        message = f"folder {out!r}: cannot be written ({reason}); name another folder"
        raise InvalidCase(message) from error
    if free < needed:
        message = f"folder {out!r}: {free} bytes are free, results take about {needed}; name another folder"
        raise InvalidCase(message)
