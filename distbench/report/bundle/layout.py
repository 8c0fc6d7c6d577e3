"""Files of a bundle: their names and size limits. Loads no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from distbench.case.identity import case_hash
from distbench.case.limits import Traffic
from distbench.case.spec import Case
from distbench.utils.text import counted
from distbench.verify.records import LISTED_TOKENS, Gathered, ResolvedCase, Token
from distbench.workload.version import InputsVersion

SCHEMA = "distbench.bundle/1"
MANIFEST = "manifest.json"
REPORT = "report.json"
KERNEL_TABLE = "kernel_table.csv"
TRACE = "routing.safetensors"
"""The recorded routing of a case that has one, with its hidden states: its step and layer alone."""

MAX_TOKENS = 64
MAX_JSON_BYTES = 16 << 20
MAX_TABLE_BYTES = 16 << 20
MAX_TRACE_BYTES = 256 << 20
MAX_HEADER_BYTES = 1 << 20
MAX_PART_BYTES = 64 << 20
"""Bytes of one rank's part: `RECORDED_BYTES` of tensors, its routing, and room for one token of any case."""

RECORDED_BYTES = 32 << 20
"""Bytes of recorded tensors over all ranks; beyond them fewer tokens are recorded."""

ROUTING_BYTES = 4 << 20
"""Bytes of a rank's own routing; later tokens are left out, and counted."""

_HASH_DIGITS = 12

Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """File of one rank: size in bytes and SHA-256, or the reason why it is missing."""

    rank: Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)]
    host: str
    size: Annotated[int, msgspec.Meta(ge=0, le=MAX_PART_BYTES)] = 0
    sha256: Sha256 = "0" * 64
    missing: str = ""


class Recorded(msgspec.Struct, frozen=True, kw_only=True):
    """Contents of the record: the failing tokens in it, the least number of others, and each rank's part.

    `routing_left_out` counts tokens, over all ranks, whose routing is not in the parts. `inputs` is the kind of inputs
    with which the case failed, which alone is recorded; empty where the case has only one.
    """

    tokens: list[Token]
    left_out: int
    parts: list[Part]
    routing_left_out: int = 0
    inputs: Literal["", "exact", "gaussian"] = ""


NOTHING_RECORDED = Recorded(tokens=[], left_out=0, parts=[])


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """`manifest.json`, written last: a bundle without one is incomplete.

    `gathered` is the input of rank 0's judgement, without timings and maps; None where the case was refused or lost its
    ranks. Its lists of tokens end at `listed_tokens`. `table_left_out` is the size in bytes of a kernel table that is
    too large to copy. `trace_sha256` is the digest of the copied part of a recorded routing, `trace_left_out` its size
    where it is too large to copy. `sub_batches` is the traffic of each, with two-batch overlap. `inputs_version` is
    that of the inputs that the case ran with; bundles without it have 1.
    """

    schema: str = SCHEMA
    inputs_version: InputsVersion = 1
    how_to_replay: list[str]
    case: Case
    traffic: Traffic | None
    limit: int | None
    gathered: Gathered | None
    recorded: Recorded
    listed_tokens: int = LISTED_TOKENS
    table_left_out: int = 0
    trace_sha256: str = ""
    trace_left_out: int = 0
    sub_batches: tuple[Traffic, ...] = ()

    @property
    def cuts(self) -> list[str]:
        """Contents left out because of their size, in words."""
        known, left_out, unrouted = len(self.recorded.tokens), self.recorded.left_out, self.recorded.routing_left_out
        table = f"{self.table_left_out} bytes, allowed are {MAX_TABLE_BYTES}"
        trace = f"{self.trace_left_out} bytes, allowed are {MAX_TRACE_BYTES}"
        found = [
            (left_out, f"{counted(left_out, 'failing token')} or more, beside the {known} recorded"),
            (unrouted, f"the routing of {counted(unrouted, 'token')}"),
            (self.table_left_out, f"the kernel table: {table}; replay with --kernel-table FILE"),
            (self.trace_left_out, f"the recorded routing: {trace}; replay with --routing trace:FILE"),
            (self.listed_tokens < LISTED_TOKENS, f"tokens that ranks list after the first {self.listed_tokens}"),
        ]
        return [what for cut, what in found if cut]

    @property
    def resolved(self) -> ResolvedCase | None:
        """The resolved case, if its ranks got that far."""
        return None if self.traffic is None else ResolvedCase(self.case, self.traffic, self.limit, self.sub_batches)


def bundle_folder(root: str, case: Case) -> Path:
    """Folder of a case's bundle below the folder that `--bundle` names."""
    return Path(root) / case_hash(case)[:_HASH_DIGITS]


def part_name(rank: int) -> str:
    """Name of a rank's file; no name is ever taken from a bundle."""
    return f"rank-{rank:05d}.safetensors"


def names_token(case: Case, token: Token) -> bool:
    """Whether the case has this token; sources from a faulty transport, or a stranger, may name any."""
    rank, number = token
    return 0 <= rank < case.ep_size and 0 <= number < case.tokens[rank]


def routed_tokens(topk: int, most: int = ROUTING_BYTES) -> int:
    """Number of a rank's first tokens whose routing fits into `most` bytes."""
    return most // (topk * 4)
