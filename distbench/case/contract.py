"""Rules that a transport, experts and a caller keep, by name (docs/plugins.md). Loads no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from distbench.case.plugins import Plugin, is_trusted
from distbench.case.spec import Case
from distbench.case.stages import Stage
from distbench.errors import BrokenContract, DistbenchError, Unsupported
from distbench.utils.text import one_line

T = TypeVar("T")

RULES: dict[str, str] = {
    "transport.made": "make returns a Transport on every rank",
    "transport.facts": "facts and about are what JSON has: texts, numbers, lists and tables of them",
    "dispatch.returns": "dispatch returns on every rank, within the stage's time limit",
    "dispatch.type": "dispatch returns a Dispatched of tensors, with scales for an fp8 payload only",
    "dispatch.shape": "hidden has R rows of H columns, scales H/128, weights and ids k, total_recv has one number",
    "dispatch.dtype": "hidden has the payload's dtype, scales and weights float32, ids and total_recv int32",
    "dispatch.device": "all buffers are on the rank's device",
    "dispatch.stays": "each dispatch returns the same buffers, at the same addresses",
    "sources.shape": "sources returns a source rank and a token, int64, of each received row",
    "combine.returns": "combine returns on every rank, within the stage's time limit",
    "combine.shape": "combine returns one row of H columns for each token of the rank",
    "combine.dtype": "combine returns the dtype of the expert rows",
    "combine.device": "combine returns rows on the rank's device",
    "caller.made": "make returns a Caller on every rank",
    "caller.text": "the caller's text is a CallerText, with a sha256 of 64 small hex digits",
    "experts.made": "make returns Experts on every rank",
    "experts.facts": "about is what JSON has: texts, numbers, lists and tables of them",
    "experts.selection": "selection returns the KernelChoice of the rows that it is asked for",
    "experts.roundings": "roundings returns the Roundings of a correct kernel, or None",
    "experts.returns": "the experts return on every rank, within the stage's time limit",
    "experts.shape": "the experts return a row of H columns for each allocated row",
    "experts.dtype": "the experts return bf16",
    "experts.device": "the experts return rows on the rank's device",
}
"""Text of each rule. R is the case's capacity, H the hidden columns, k the slots of a token."""

_CALLS = {Stage.DISPATCH: "transport", Stage.COMBINE: "transport", Stage.EXPERTS: "experts"}


class Contract:
    """The rules, held against the calls of one plugin."""

    def __init__(self, part: str, name: str) -> None:
        """Take the part (transport, experts or caller) and the plugin's name."""
        self._breaks = f"{part} {name} {'break' if part == 'experts' else 'breaks'}"
        self._raised = "" if part == "experts" else "it raised "

    def call(self, rule: str, call: Callable[..., T], *arguments: Any) -> T:
        """Make a call of the plugin; an ending that distbench knows passes through.

        Raises:
            BrokenContract: any other exception breaks `rule`.
        """
        try:
            return call(*arguments)
        except DistbenchError:
            raise
        except Exception as error:
            message = f"{self._breaks} {rule}: {self._raised}{type(error).__name__}: {one_line(error)}"
            raise BrokenContract(message) from error

    def refuse(self, rule: str, why: str) -> NoReturn:
        """Say that `rule` is broken, and how.

        Raises:
            BrokenContract: always.
        """
        message = f"{self._breaks} {rule}: {why}"
        raise BrokenContract(message)


def check_stated(plugin: Plugin, part: str, case: Case, device: str) -> None:
    """Refuse a case that needs what a plugin does not state; `device` is cpu, cuda, or empty where none is known.

    Raises:
        Unsupported: names the key of the case.
    """
    lacks = {
        f"device = {device}": bool(device) and device not in plugin.devices,
        f"dispatch_dtype = {case.dispatch_dtype}": case.dispatch_dtype not in plugin.dtypes,
        "ranks without tokens": not plugin.zero_tokens and 0 in case.tokens,
        "ids of -1": not plugin.negative_ids and bool(case.dropped_slots or case.dropped_tokens),
        "graph": (case.graph == "layer" or (case.graph and part == "experts")) and not plugin.graphs,
        "two_batch_overlap": case.two_batch_overlap and part == "transport" and not plugin.two_batch_overlap,
    }
    for what, lacking in lacks.items():
        if lacking:
            message = f"{part} {getattr(case, part)}: states no support of {what}; drop it, or use another {part}"
            raise Unsupported(message)


def unreturned(case: Case, stage: str) -> str:
    """Rule that a rank breaks which stands still or ends in `stage`, as the end of a message; empty without a plugin.

    The stage must be one of a plugin's calls.
    """
    part = next((part for called, part in _CALLS.items() if called == stage), "")
    if not part or is_trusted(part, getattr(case, part)):
        return ""
    return f"; {part} {getattr(case, part)} breaks {stage}.returns"
