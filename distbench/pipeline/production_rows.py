"""The rows M that a caller's code gives to the experts, by its package's rule, as distbench expects them.

Sources: `recv_bound.py` for SGLang. vLLM 0.33.0 cuts nothing. ATOM: `_maybe_trim_dispatch_output` of its modular
kernel, and `trim_vllm_mori_dispatch_tensors`, by which its plugin for vLLM replaces it (`callers/atom/definitions.py`).
"""

from __future__ import annotations

from distbench.pipeline.recv_bound import sglang_rows
from distbench.verify.records import ResolvedCase


def production_rows(resolved: ResolvedCase, rank: int, local_ranks: int | None = None) -> int:
    """Rows that the case's caller gives to the experts on `rank`; a plugin's cuts as SGLang does."""
    caller, capacity = resolved.case.caller, resolved.traffic.capacity
    if caller not in ("vllm", "atom"):
        return sglang_rows(resolved, rank, local_ranks)
    rows = _atom_rows(resolved, rank) if caller == "atom" else capacity
    return rows if 0 < rows < capacity else capacity


def _atom_rows(resolved: ResolvedCase, rank: int) -> int:
    """Rows of ATOM's cut; 0 or at least R for none."""
    case, traffic = resolved.case, resolved.traffic
    bucket = case.atom_graph_bs * case.ep_size
    if case.atom_rule == "native":
        return bucket
    return bucket * case.topk_slots if bucket else traffic.total_recv[rank]
