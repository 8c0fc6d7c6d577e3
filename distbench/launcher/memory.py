"""Memory that a launch needs, on the host and on devices, and memory that there is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from distbench.case.entry import Entry
from distbench.case.limits import Traffic
from distbench.case.spec import Case
from distbench.errors import Unsupported
from distbench.pipeline.recv_bound import limit_rows
from distbench.utils.devices import free_device_bytes
from distbench.utils.text import counted

# Memory that ranks share with the fork server, and memory of each rank besides tensors.
_SHARED_BYTES, _RANK_BYTES = 160 << 20, 40 << 20
# Weights widened to float64, in blocks where there are many.
_SCRATCH_BYTES, _WIDENED = 120 << 20, 4
# Tokens whose errors are measured on a CPU, at most (`verify.error_check`).
_SAMPLED_TOKENS = 128
# Least memory of a CUDA context on a device.
_CONTEXT_BYTES = 256 << 20
_GROUP = Path("/sys/fs/cgroup")
_GROUP_FILES = ("memory.max", "memory.current", "memory.stat")


def check_memory(entries: Iterable[Entry], available: int | None = None) -> None:
    """Refuse a launch whose largest case needs more memory than this machine has available.

    `available` is in bytes; None queries the machine.

    Raises:
        Unsupported: names the bytes needed and available, and what to make smaller.

    """
    largest = max(entries, key=lambda entry: memory_bytes(entry.case))
    needed = memory_bytes(largest.case)
    free = available_bytes() if available is None else available
    if needed > free:
        message = (
            f"memory: case {largest.name} needs about {needed} bytes for {counted(largest.case.ep_size, 'rank')} "
            f"({needed / 2**30:.1f} GiB), {free} are available; lower max_dispatch_tokens_per_rank, or use fewer "
            "ranks or a smaller model"
        )
        raise Unsupported(message)


def memory_bytes(case: Case) -> int:
    """Estimated bytes of all ranks of a case: weights, buffers, routed rows, rows staged for peers, processes."""
    element = 2
    weights = 3 * case.experts_per_rank * case.intermediate_size * case.hidden_size * element
    payload = case.hidden_size * (1 if case.dispatch_dtype == "fp8" else element) + 8 * case.topk_slots
    buffers = _transports(case) * case.capacity * (payload + case.hidden_size * element)
    scratch = max(min(_WIDENED * weights, _SCRATCH_BYTES), 0 if case.numerics == "exact" else _measuring_bytes(case))
    work = max(case.tokens) * case.topk_slots * case.hidden_size * 16 + scratch
    laid = max(case.tokens) * min(case.topk_slots, case.ep_size) * (payload + case.hidden_size * element)
    return _SHARED_BYTES + case.ep_size * (weights + buffers + work + laid + _RANK_BYTES)


def _transports(case: Case) -> int:
    """Transports of a rank: each sub-batch of two-batch overlap has one, with receive buffers for all its capacity."""
    return 1 + case.two_batch_overlap


def _measuring_bytes(case: Case) -> int:
    """Bytes that measuring errors takes on a rank: an expert's weights in float64 and float32, and the sample's rows.

    `verify.ideal` has the weights of one expert at a time, or of some small ones, which take no more than the scratch.
    """
    expert = 32 * case.intermediate_size * case.hidden_size
    rows = min(sum(case.tokens), _SAMPLED_TOKENS) * case.hidden_size * (32 + 8 * case.topk_slots)
    return expert + rows


def check_device_memory(entries: Iterable[Entry], held: Sequence[str], available: int | None = None) -> None:
    """Refuse a launch whose largest case needs more memory than the fullest of the devices `held` has free.

    `available` is in bytes; None queries the devices. Nothing is refused where it is unknown.

    Raises:
        Unsupported: names the bytes needed and available, and what to make smaller.

    """
    on_device = [entry for entry in entries if entry.case.device != "cpu" and not entry.refused]
    if not held or not on_device:
        return

    def taken(entry: Entry) -> int:
        sharing = -(-entry.case.ep_size // len(held)) if entry.case.share_devices else 1
        return sharing * device_bytes(entry.case)

    largest = max(on_device, key=taken)
    needed, free = taken(largest), free_device_bytes(held) if available is None else available
    if free is not None and needed > free:
        message = (
            f"device memory: case {largest.name} needs at least {needed} bytes on each device "
            f"({needed / 2**30:.1f} GiB), {free} are free on the fullest of {', '.join(held)}; end what else runs "
            "there, lower max_dispatch_tokens_per_rank, or use more ranks or a smaller model"
        )
        raise Unsupported(message)


def device_bytes(case: Case) -> int:
    """Least bytes of a rank of a case on its device: weights, buffers, routed rows, and the CUDA context.

    The Triton experts hold an activation and an output for each of R x top-k routes, and float8 weights as well. The
    graph of each number of rows holds such memory and an output of its own.
    """
    elements = 3 * case.experts_per_rank * case.intermediate_size * case.hidden_size
    triton = case.experts == "triton"
    weights = elements * (3 if triton and case.dispatch_dtype == "fp8" else 2)
    payload = case.hidden_size * (1 if case.dispatch_dtype == "fp8" else 2) + 8 * case.topk_slots
    returned = case.hidden_size * (4 if case.transport == "symmetric" else 2)  # which lays them out for peers
    buffers = _transports(case) * case.capacity * (payload + returned)
    routes = case.topk_slots * (case.hidden_size + case.intermediate_size) * 2 if triton else 0
    cut = _least_cut(case) if case.graph else 0
    return weights + buffers + case.capacity * routes + cut * (routes + case.hidden_size * 2) + _CONTEXT_BYTES


def _least_cut(case: Case) -> int:
    """Least rows after a cut that is certain to run; 0 where no such cut needs a graph of its own.

    Each token goes to at least one rank, so the fullest rank receives at least the mean of all tokens over all ranks.
    """
    total = sum(case.tokens)
    if "max-recv-" in case.limit or not total:
        return 0
    rows = limit_rows(case, Traffic(case.tokens, (-(-total // case.ep_size),), case.capacity)) or 0
    fixed = case.limit.isdigit() or case.limit_key == "recv_bound"
    refused = fixed and rows < total and case.policy == "strict"
    return rows if rows < case.capacity and not refused else 0


def available_bytes() -> int:
    """Memory available to new processes: Linux's figure, capped by the control group's limit.

    The group's file cache counts as free.
    """
    meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(meminfo["MemAvailable"].split()[0]) * 1024
    try:
        limit, used, table = ((_GROUP / name).read_text().strip() for name in _GROUP_FILES)
    except OSError:
        return free
    if limit == "max":
        return free
    parts = dict(line.split() for line in table.splitlines())
    files = sum(int(parts.get(name, 0)) for name in ("active_file", "inactive_file"))
    return min(free, int(limit) - int(used) + files)
