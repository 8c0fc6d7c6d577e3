"""Sizes of symmetric buffers, computed by the C++ of MoRI's `InitializeShmemBuf`, read as Python."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

_REWRITES = (
    (r"//[^\n]*", ""),
    (r"#ifdef ENABLE_PROFILER.*?#endif", ""),
    (r"auto& bufs = [^;]*;", ""),
    (r"static_cast<\w+>\(", "("),
    (r"sizeof\((?:float|index_t)\)", "4"),
    (r"std::max\(", "max("),
    (r"KernelType::(\w+)", r"'\1'"),
    (r"&&", " and "),
    (r"\|\|", " or "),
    (r"\b(?:const int|size_t) (\w+) =", r"\1 ="),
    (r"\b(?:bufs\.)?(\w+) = MallocSymm\((\w+), [^;]*\)", r"sizes['\1'] = \2"),
    (r"=\s*\(([^;?]*)\)\s*\?([^;:]*):([^;:]*);", r"= (\2) if (\1) else (\3);"),
    (r"(?<![/*])/(?![/*])", "//"),
)


def buffer_sizes(body: str, config: Any) -> dict[str, int]:
    """Bytes of each symmetric buffer by name; `body` is the function's body, `config` has the C++ members' names."""
    for pattern, replacement in _REWRITES:
        body = re.sub(pattern, replacement, body, flags=re.DOTALL)
    lines, depth = [], 0
    for token in re.findall(r"[^;{}]+\{|[^;{}]+;|\}", body):
        text = " ".join(token.strip("{; \n").split())
        if token.endswith("}"):
            depth -= 1
        elif token.endswith("{"):
            lines.append("    " * depth + re.sub(r"^(else if|if|else)\s*\(?(.*?)\)?$", _branch, text))
            depth += 1
        elif text:
            lines.append("    " * depth + text)
    sizes: dict[str, int] = {}
    known = {
        name: getattr(config, name) for name in ("fp8BlockwiseCombineScaleDim", "fp8BlockwiseCombineScaleTypeSize")
    }
    scope = {"sizes": sizes, "config": config, "IsBlockwiseCombineQuant": lambda quant: "blockwise" in quant, **known}
    exec("\n".join(lines), scope)  # noqa: S102 - arithmetic of a release
    return sizes


def _branch(matched: re.Match[str]) -> str:
    word, condition = matched[1].replace("else if", "elif"), matched[2]
    return f"{word} {condition}:" if condition else f"{word}:"


def cpp_config(plan: Any, case: Any, scale_blocks: int) -> SimpleNamespace:
    """The members of the C++ configuration that its sizes read, for a case under a plan."""
    ranks, sender, rows, topk = case.ep_size, case.max_dispatch_tokens_per_rank, case.capacity, case.topk
    scales = case.hidden_size // 128 if case.dispatch_dtype == "fp8" else 0
    region = -(-case.hidden_size // 2) if plan.quant == "fp4_blockwise" else case.hidden_size * 2
    return SimpleNamespace(
        kernelType=plan.kernel,
        quantType=plan.quant,
        worldSize=ranks,
        gpuPerNode=plan.gpu_per_node,
        scaleDim=scales,
        scaleTypeSize=4,
        maxTokenTypeSize=2,
        numExpertPerToken=topk,
        fp8BlockwiseCombineScaleDim=scale_blocks if "blockwise" in plan.quant else 0,
        fp8BlockwiseCombineScaleTypeSize=4,
        HiddenDimSz=lambda: case.hidden_size,
        MaxNumTokensToSendPerRank=lambda: sender,
        MaxNumTokensToSend=lambda: ranks * sender,
        MaxNumTokensToRecv=lambda: rows,
        MaxXferBytesPerToken=lambda: case.hidden_size * 2 + 8 * topk + 4 + scales * 4,
        CombineTokenRegionBytes=lambda: region,
        IndexBytes=lambda: 4 * topk,
        WeightBytes=lambda: 4 * topk,
        SrcTokenIdBytes=lambda: 4,
    )
