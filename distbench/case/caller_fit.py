"""Values of a case that a caller's code is not run with."""

from __future__ import annotations

from distbench.case.plugins import is_built_in
from distbench.case.spec import Case
from distbench.errors import InvalidCase


def check_caller_fits(case: Case) -> None:
    """Refuse what a caller's code is not run with.

    Raises:
        InvalidCase: names it, and the fix.
    """
    if case.caller == "own":
        return
    refused = {
        f"experts {case.experts}": (case.experts != "aiter", "production calls aiter's fused_moe; use experts aiter"),
        f"policy {case.policy}": (case.policy == "guard", "production has no guard; use strict or unchecked"),
        "graph": (case.graph, "the caller's pass is not captured; drop it"),
        "inject": (bool(case.inject), "faults are injected into distbench's own arms; drop it"),
        f"policy {case.policy} ": (
            case.policy == "unchecked" and case.caller in ("vllm", "atom"),
            "its own cut loses no row, whatever the limit; use strict",
        ),
        "caller_wheel": (bool(case.caller_wheel) and case.caller == "atom", "ATOM has none; give --caller-folder"),
        "caller_wheel ": (
            bool(case.caller_wheel) and not is_built_in("caller", case.caller),
            "a plugin brings its own text; drop it",
        ),
        "caller_folder": (bool(case.caller_folder) and case.caller != "atom", "give a wheel: --caller-wheel"),
        f"activation {case.activation}": (case.activation != "silu", "the caller's layer has SiLU; drop it"),
        "swiglu_limit": (bool(case.swiglu_limit), "the caller's layer has none; drop it"),
        "bias": (case.bias, "the caller's layer has none; drop it"),
        "hidden_pad": (bool(case.hidden_pad), "the caller's layer has no padding; drop it"),
        "intermediate_pad": (bool(case.intermediate_pad), "the caller's layer has no padding; drop it"),
        "shared_experts": (
            bool(case.shared_experts) and case.caller in ("vllm", "atom"),
            "vLLM refuses fused shared experts with MoRI, and ATOM's layer has none; drop it",
        ),
        "doweight_stage1": (case.doweight_stage1, "the caller's layer weighs its output; drop it"),
    }
    for what, (is_so, fix) in refused.items():
        if is_so:
            message = f"caller = {case.caller}: not with {what.strip()}: {fix}"
            raise InvalidCase(message)
    if case.caller == "atom":
        _check_atom(case)


def _check_atom(case: Case) -> None:
    """Refuse a batch that ATOM would not make, or ATOM without its text."""
    if not case.caller_folder:
        message = "caller = atom: ATOM is installed from a checkout; name the folder that holds it: --caller-folder"
        raise InvalidCase(message)
    bucket, (least, most) = case.atom_graph_bs, (min(case.tokens), max(case.tokens))
    if bucket and (most > bucket or (case.atom_rule == "vllm-plugin" and least < bucket)):
        needs = "exactly" if case.atom_rule == "vllm-plugin" else "at most"
        message = (
            f"atom_graph_bs = {bucket}: a rank has {most if most > bucket else least} tokens, and ATOM's batch has "
            f"{needs} {bucket} on each; give such tokens, or 0"
        )
        raise InvalidCase(message)
