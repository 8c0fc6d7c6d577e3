"""deep_ep: what the methods of Buffer take and return, and the bounds that the transport states."""

from __future__ import annotations

import ast

from distbench.transport.deepep.normal import _Handle
from tests.contract.facts.fact import Fact
from tests.contract.facts.source import Gone, Source, signature

PACKAGE = "deep_ep"
LEGACY = "deep_ep/buffers/legacy.py"

_RETURNED: dict[str, tuple[str, ...]] = {
    "get_dispatch_layout": (
        *("num_tokens_per_rank", "num_tokens_per_rdma_rank", "num_tokens_per_expert", "is_token_in_rank"),
        "",
    ),
    "dispatch": ("", "recv_topk_idx", "recv_topk_weights", "num_recv_tokens_per_expert_list", "handle", ""),
    "combine": ("recv_x", "recv_topk_weights", ""),
    "low_latency_dispatch": ("packed_recv_x", "packed_recv_count", "handle", "", "hook"),
    "low_latency_combine": ("combined_x", "", "hook"),
}
_POSITIONAL = {
    "__init__": ("group", "num_nvl_bytes", "num_rdma_bytes"),
    "get_dispatch_layout": ("topk_idx", "num_experts"),
    "dispatch": ("x",),
    "combine": ("x", "handle"),
    "low_latency_dispatch": ("x", "topk_idx", "num_max_dispatch_tokens_per_rank", "num_experts"),
    "low_latency_combine": ("x", "topk_idx", "topk_weights", "handle"),
}
_KEYWORDS = {
    "__init__": {"low_latency_mode", "num_qps_per_rank", "explicitly_destroy"},
    "dispatch": {
        *("num_tokens_per_rank", "num_tokens_per_rdma_rank", "is_token_in_rank", "num_tokens_per_expert"),
        *("topk_idx", "topk_weights"),
    },
    "low_latency_dispatch": {"use_fp8", "async_finish", "return_recv_hook"},
    "low_latency_combine": {"use_logfmt", "zero_copy", "async_finish", "return_recv_hook"},
}
_BOUNDS = {
    "low_latency_dispatch": "assert self.nvshmem_qp_depth >= (num_max_dispatch_tokens_per_rank + 1) * 2",
    "__init__": "os.environ.get('NVSHMEM_QP_DEPTH', '1024')",
    "get_dispatch_config": "assert num_ranks in config_map, ",
    "get_combine_config": "assert num_ranks in config_map, ",
}


def _method(source: Source, name: str) -> ast.FunctionDef:
    found: ast.FunctionDef = source.definition(LEGACY, f"Buffer.{name}")
    return found


def _named(value: ast.expr | None) -> tuple[str, ...]:
    """Names in a tuple; empty for what is no name."""
    parts = value.elts if isinstance(value, ast.Tuple) else []
    return tuple(part.id if isinstance(part, ast.Name) else "" for part in parts)


def _returns(source: Source) -> dict[str, tuple[str, ...]]:
    found = {}
    for name in _RETURNED:
        returns = [node for node in ast.walk(_method(source, name)) if isinstance(node, ast.Return)]
        found[name] = _named(max(returns, key=lambda node: node.lineno).value)
    return found


def _handles(source: Source) -> dict[str, tuple[str, ...]]:
    found = {}
    for name in ("dispatch", "low_latency_dispatch"):
        assigned = [
            _named(node.value)
            for node in ast.walk(_method(source, name))
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "handle"
        ]
        if not assigned:
            message = f"no handle in {name}"
            raise Gone(message)
        found[name] = assigned[-1]
    return found


def _our_handles(_: str) -> dict[str, tuple[str, ...]]:
    prefixes = ("rank_prefix_matrix", "channel_prefix_matrix", "recv_channel_prefix_matrix")
    normal = (*prefixes, "recv_src_idx", "is_token_in_rank", "send_head")
    assert len(normal) == len(_Handle._fields)
    low_latency = ("packed_recv_src_info", "packed_recv_layout_range", "num_max_dispatch_tokens_per_rank")
    return {"dispatch": normal, "low_latency_dispatch": (*low_latency, "", "num_experts")}


def _parameters(source: Source) -> dict[str, tuple[str, ...]]:
    """Parameters by position, as far as they are passed so, and the keywords that are there."""
    found = {}
    for name, positional in _POSITIONAL.items():
        theirs = list(signature(_method(source, name)))
        keywords = _KEYWORDS.get(name, set()) & {*theirs}
        found[name] = (*theirs[: len(positional)], *sorted(keywords))
    return found


def _our_parameters(_: str) -> dict[str, tuple[str, ...]]:
    return {name: (*positional, *sorted(_KEYWORDS.get(name, ()))) for name, positional in _POSITIONAL.items()}


def _bounds(source: Source) -> dict[str, bool]:
    return {name: text in ast.unparse(_method(source, name)) for name, text in _BOUNDS.items()}


FACTS = (
    Fact("what methods of Buffer return", PACKAGE, LEGACY, _returns, lambda _: _RETURNED),
    Fact("fields of Buffer's handles", PACKAGE, LEGACY, _handles, _our_handles),
    Fact("parameters of Buffer's methods", PACKAGE, LEGACY, _parameters, _our_parameters),
    Fact("bounds of Buffer", PACKAGE, LEGACY, _bounds, lambda _: dict.fromkeys(_BOUNDS, True)),
)
