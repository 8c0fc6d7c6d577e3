"""Variables of the MoRI path and of aiter that are set without effect on a case, each with the reason.

The names that MoRI and aiter read themselves are those of their sources: mori 2026-08-21 (`getenv` in `src` and
`include`, `os.environ` in `python/mori`), its wheels up to 1.2.5.dev20261026, and aiter 2026-08-22 (`fused_moe.py`,
`jit/`, `ops/flydsl`, `ops/quant.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from distbench.case.entry import Entry
from distbench.case.environment import keys_of, reason_unread
from distbench.case.profiles import program_of
from distbench.case.sglang_env import is_secret, near_miss
from distbench.case.sglang_releases import EP_V2, NEWEST, TRANSFER_VARIABLES, VARIABLES, reads
from distbench.case.spec import Case
from distbench.experts.selection.releases import rules_for
from distbench.transport.mori.config import HEAP_SIZE, SHMEM_MODE, is_isolated
from distbench.transport.mori.releases import (
    FIRST_WITH_ATOMICS_SWITCH,
    NO_ATOMICS,
    RAIL_ONLY,
    RELAXED_ORDERING,
    reads_atomics_switch,
    version_for,
)

_LISTED = re.compile(r"(?:^|_)MORI|^(?:AITER|ATOM|VLLM_ROCM)_")
_MORI_KEYS = ("combine_quant", "launch_mode", "inter_kernel_switch", "mori_kernel")
_OVERRIDES = ("aiter_ksplit", "aiter_bypass_tune")
_AITER_KEYS = ("kernel_table", *_OVERRIDES)
_PROGRAMS = ("SGLANG_", "VLLM_", "ATOM_")
_SHOWN_CHARACTERS = 60

MORI_READS = frozenset(
    f"MORI_{name}"
    for name in (
        *("APP_LOG_LEVEL", "BNXT_ENABLE_UDP_SPORT", "BOOTSTRAP_TIMEOUT", "CORE_LOG_LEVEL", "CPU_AFFINITY_NO_SPLIT"),
        *("DEBUG_INFO", "DEVICE_NIC", "ENABLE_HOST_PROXY", "NODE_ID"),
        *("DISABLE_AUTO_XGMI", "DISABLE_IONIC_CCQE", "DISABLE_JIT", "DISABLE_LOGGING", "DISABLE_P2P", "DISABLE_TOPO"),
        *("ENABLE_DMABUF_REG", "ENABLE_RAIL_ONLY", "ENABLE_SDMA"),
        *("EP_COMM", "EP_DISABLE_RDMA_ATOMICS", "EP_DISABLE_VIEW_CACHE"),
        *("EP_TUNING_CONFIG", "FP8_COMBINE_SCALE_DIM", "GLOBAL_LOG_LEVEL", "GPU_ARCHS", "IB_ENABLE_RELAXED_ORDERING"),
        *("IB_GID_INDEX", "IB_PATH_MTU", "IGNORE_CPU_AFFINITY", "JIT_ARCH", "JIT_CACHE_DIR", "JIT_EXTRA_FLAGS"),
        *("JIT_HIPCC", "JIT_KEEP_FAILED", "JIT_VERBOSE", "KERNEL_DIR", "LOG_FILE", "LOG_PATTERN"),
        *("MLX5_ENABLE_UDP_SPORT", "NUM_QP_PER_PE", "OPS_LOG_LEVEL", "PRECOMPILE", "RDMA_DEVICES", "RDMA_SL"),
        *("RDMA_TC", "ROCM_SMI_PATH", "SDMA_NUM_CHANNELS", "SHMEM_HEAP_SIZE", "SHMEM_HEAP_TYPE", "SHMEM_LOG_LEVEL"),
        *("SHMEM_MODE", "SHMEM_VMM_CHUNK_SIZE", "SOCKET_IFNAME", "SOURCE_ROOT", "WAVE_SIZE"),
    )
)
_AITER_READS = frozenset(
    f"AITER_{name}"
    for name in (
        *("ASM_DEBUG", "ASM_DIR", "BF16_FP8_MOE_BOUND", "CONFIG_GROUPED_FMOE", "DISABLE_KERNARG_PRELOAD"),
        *("ENABLE_EXPERIMENTAL", "ENABLE_VSKIP", "FLYDSL_EP_NO_FAKE_EXPERT", "FLYDSL_FORCE", "FLYDSL_FORCE_REDUCE"),
        *("FLYDSL_KERNARG_PRELOAD", "FLYDSL_KERNARG_PRELOAD_COUNT", "FLYDSL_MOE_EXPERT_SCHEDULING_MODE"),
        *("FLYDSL_STAGE2_FP8", "FORCE_A8W4", "GPU_ARCHS", "JIT_DIR", "LOG_LEVEL", "LOG_MORE", "LOG_TUNED_CONFIG"),
        *("META_DIR", "MOE_SORT_BACKEND", "MXFP4_INTERMEDIATE", "ONLINE_TUNE", "REBUILD", "SITUV2_A4W4"),
        *("SITUV2_A8W4", "SYMBOL_VISIBLE", "USE_CK_MOE_SORTING", "USE_FLYDSL_MOE_SORTING", "USE_GROUPED_GEMM"),
        *("USE_NT", "XBFLOAT16"),
    )
)
_PACKAGES = {"mori": MORI_READS, "aiter": _AITER_READS}
_STAND_INS = {
    "mori": frozenset(
        {HEAP_SIZE, SHMEM_MODE, "MORI_FP8_COMBINE_SCALE_DIM", "MORI_EP_COMM", RAIL_ONLY, NO_ATOMICS, RELAXED_ORDERING}
    ),
    "aiter": frozenset({"AITER_JIT_DIR"}),
}


def unused_variables(environ: Mapping[str, str], case: Case, sources: Mapping[str, str]) -> tuple[str, ...]:
    """One line that lists them with their values and reasons, or none. Near misses have their own warnings.

    `sources` names, for each key of the case, the source of its value.
    """
    reasons: dict[str, list[str]] = {}
    by_sglang = program_of(case.profile) == "sglang"
    for name in sorted(environ):
        if _LISTED.search(name) and environ[name].strip() and not (by_sglang and near_miss(name, environ)):
            reason = _reason(name, environ, case, sources)
            if reason:
                value = "(not shown)" if is_secret(name) else f"{environ[name]:.{_SHOWN_CHARACTERS}}"
                reasons.setdefault(reason, []).append(f"{name}={value}")
    if not reasons:
        return ()
    listed = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in reasons.items())
    return (f"set and not used by this case: {listed}",)


def note_of_launch(environ: Mapping[str, str], entries: Sequence[Entry]) -> str:
    """One line about the cases of a launch, or nothing: the first list, and the number of others in the reports."""
    lines = list(dict.fromkeys(line for one in entries for line in unused_variables(environ, one.case, one.sources)))
    if not lines:
        return ""
    return lines[0] + (f"; reports have {len(lines) - 1} other lists" if len(lines) > 1 else "")


def _reason(name: str, environ: Mapping[str, str], case: Case, sources: Mapping[str, str]) -> str:
    """Reason why the case does not use the variable; empty where it does."""
    by_sglang, keys = program_of(case.profile) == "sglang", keys_of(case.profile)
    if by_sglang and name in VARIABLES and not reads(name, case.sglang_version):
        return f"SGLang {case.sglang_version or NEWEST} does not read it, {VARIABLES[name]} do"
    if name in keys:
        return _reason_of_key(name, keys[name], case, sources)
    if not by_sglang and name.startswith(_PROGRAMS):
        return reason_unread(name, case.profile)
    if name in TRANSFER_VARIABLES or name.startswith("MORI_IO_"):
        return "for the transfer of the KV cache"
    return "" if by_sglang and name == EP_V2 else _reason_of_others(name, environ, case)


def _reason_of_others(name: str, environ: Mapping[str, str], case: Case) -> str:
    if name == HEAP_SIZE and is_isolated(environ):
        return f"{SHMEM_MODE} is {environ[SHMEM_MODE]}, which has no heap"
    if name.startswith(("MORI_", "AITER_")):
        return _reason_of_package(name, case)
    return "nothing that distbench runs reads it"


def _reason_of_key(name: str, key: str, case: Case, sources: Mapping[str, str]) -> str:
    bounded = key == "mori_kernel" and case.recv_bound  # the bound follows production's kernel under any transport
    if key in _MORI_KEYS and case.transport != "mori" and not bounded:
        return f"transport {case.transport} has no {key}"
    if key in _AITER_KEYS and case.experts == "triton":
        return "experts triton have their own tables"
    if key in _OVERRIDES and not rules_for(case.aiter_version).reads_overrides:
        return f"aiter {case.aiter_version} does not read it"
    if key == "recv_bound" and case.limit != "off":
        return f"limit is set by {sources.get('limit', 'default')}"
    source = sources.get(key, "default")
    if source in ("default", f"env:{name}") or source.startswith(("preset:", "profile:")):
        return ""
    return f"{key} is set by {source}"


def _reason_of_package(name: str, case: Case) -> str:
    package = name.partition("_")[0].lower()
    if package not in (case.transport, case.experts):
        return f"this case does not run {package}"
    if name == NO_ATOMICS and not reads_atomics_switch(version_for(case)):
        return f"mori {version_for(case)} does not read it, {FIRST_WITH_ATOMICS_SWITCH} and later do"
    if name in (_STAND_INS if case.emulate else _PACKAGES)[package]:
        return ""
    return f"the stand-in of {package} does not read it" if case.emulate else f"{package} is not known to read it"
