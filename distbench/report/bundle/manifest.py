"""Writing of the manifest that completes a bundle. Loads no torch: the parent writes it for lost ranks."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from distbench.case.aiter_env import table_bytes
from distbench.case.spec import Case
from distbench.case.trace_name import trace_name
from distbench.errors import InvalidCase
from distbench.report.bundle.layout import (
    KERNEL_TABLE,
    MANIFEST,
    MAX_JSON_BYTES,
    MAX_TABLE_BYTES,
    MAX_TRACE_BYTES,
    REPORT,
    TRACE,
    Manifest,
    Recorded,
    names_token,
)
from distbench.report.files import atomic_file, write_atomically
from distbench.report.schema import Report
from distbench.report.terminal import print_note
from distbench.utils.text import one_line
from distbench.verify.records import LISTED_TOKENS, Divergence, Gathered, Observation, Outcome, Token
from distbench.workload.version import INPUTS_VERSION

_SHORTER_LISTS = (LISTED_TOKENS, LISTED_TOKENS // 4, LISTED_TOKENS // 16, 1, 0)


@contextlib.contextmanager
def without_a_bundle(name: str) -> Iterator[None]:
    """Report a bundle of case `name` that cannot be written: its verdict stands without one."""
    try:
        yield
    except OSError as error:
        print_note(f"no bundle of case {name}: {error.filename or 'its folder'}: {error.strerror}; its verdict stands")


def write_manifest(folder: Path, report: Report, outcome: Outcome, recorded: Recorded) -> None:
    """Complete the parts to a bundle: write the report, the kernel table, recorded routing, and the manifest last.

    Where the records of very many ranks would be too large to read back, their lists of tokens are shortened; where
    even that is not enough, no bundle is written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    case, resolved = outcome.case, outcome.resolved
    trace = _write_trace(folder, case)
    manifest = Manifest(
        inputs_version=INPUTS_VERSION,
        how_to_replay=[
            f"distbench replay {folder}",
            f"distbench replay {folder} --device cpu --transport collective --experts reference",
            f"distbench replay {folder} --offline",
        ],
        case=case,
        traffic=resolved.traffic if resolved else None,
        limit=resolved.limit if resolved else None,
        sub_batches=resolved.sub_batches if resolved else (),
        gathered=outcome.gathered,
        recorded=recorded,
        table_left_out=_write_table(folder, case),
        trace_sha256=trace if isinstance(trace, str) else "",
        trace_left_out=0 if isinstance(trace, str) else trace,
    )
    told = _first_that_fits(iter([_without_raw_times(report)]))
    content = _first_that_fits(_with_shorter_lists(manifest))
    if told is not None and content is not None:
        write_atomically(folder / REPORT, told)
        write_atomically(folder / MANIFEST, content)


def _write_table(folder: Path, case: Case) -> int:
    """Copy the case's kernel table; return its size where it is too large to copy, else 0."""
    if not case.kernel_table:
        return 0
    table = table_bytes(case.kernel_table)
    if len(table) > MAX_TABLE_BYTES:
        return len(table)
    write_atomically(folder / KERNEL_TABLE, table)
    return 0


def _write_trace(folder: Path, case: Case) -> str | int:
    """Copy the case's step and layer of a recorded routing; return its digest, or its size where it is too large.

    Recorded hidden states go with it where the case uses them, and then no other user may enter the folder.
    """
    named = trace_name(case.routing)
    if named is None:
        return ""
    from distbench.workload.routing_spec import recorded_slice, recorded_tensors  # noqa: PLC0415 - loads numpy
    from distbench.workload.trace_file import Header, trace_bytes  # noqa: PLC0415 - likewise

    try:
        one = recorded_slice(named)
        one = one if case.numerics == "exact" else one._replace(tensors=recorded_tensors(named))
    except InvalidCase as error:  # it was there when the case ran
        raise OSError(0, one_line(error), named.path) from error
    header = Header("", case.num_experts, case.topk, case.ep_size, "a bundle", {})
    if one.tensors is not None:
        if one.tensors.size > MAX_TRACE_BYTES:
            return one.tensors.size
        folder.chmod(0o700)  # the parts have rows of recorded hidden states as well
    content = trace_bytes(header, {(named.step or 0, named.layer or 0): one})
    if len(content) > MAX_TRACE_BYTES:
        return len(content)
    with atomic_file(folder / TRACE, private=one.tensors is not None) as file:
        file.write(content)
    return hashlib.sha256(content).hexdigest()


def _first_that_fits(documents: Iterator[Any]) -> bytes | None:
    """First document within a reader's limits, as indented lines where they fit; None for none."""
    for document in documents:
        plain = msgspec.json.encode(document)
        lines = msgspec.json.format(plain, indent=2) + b"\n" if len(plain) <= MAX_JSON_BYTES else plain
        for content in (lines, plain):
            if len(content) <= MAX_JSON_BYTES:
                return content
    return None


def _without_raw_times(report: Report) -> Report:
    ranks = [msgspec.structs.replace(rank, layer_us={}) for rank in report.ranks]
    return msgspec.structs.replace(report, ranks=ranks)


def _with_shorter_lists(manifest: Manifest) -> Iterator[Manifest]:
    """Yield the manifest with ever shorter lists of tokens, all of them the case's: a faulty transport names others."""
    gathered = manifest.gathered
    if gathered is None:
        yield manifest
        return
    for most in _SHORTER_LISTS:
        shorter = _with_shorter_records(gathered, manifest.case, most)
        yield msgspec.structs.replace(manifest, gathered=shorter, listed_tokens=most)


def _with_shorter_records(gathered: Gathered, case: Case, most: int) -> Gathered:
    records = [_shortened(record, case, most) for record in gathered.observations]
    other = None if gathered.gaussian is None else _with_shorter_records(gathered.gaussian, case, most)
    return msgspec.structs.replace(gathered, observations=records, gaussian=other)


def _shortened(record: Observation, case: Case, most: int) -> Observation:
    lost = msgspec.structs.replace(record.lost, tokens=_known(record.lost.tokens, case, most))
    divergences = [_shortened_evidence(found, case, most) for found in record.divergences]
    return msgspec.structs.replace(record, lost=lost, divergences=divergences, durations_us={}, difference_map={})


def _shortened_evidence(found: Divergence, case: Case, most: int) -> Divergence:
    evidence = msgspec.structs.replace(found.evidence, tokens=_known(found.evidence.tokens, case, most))
    if found.source_rank is None or found.source_token is None:
        return msgspec.structs.replace(found, evidence=evidence)
    known = names_token(case, (found.source_rank, found.source_token))
    source = {} if known else {"source_rank": None, "source_token": None}
    return msgspec.structs.replace(found, evidence=evidence, **source)


def _known(tokens: list[Token], case: Case, most: int) -> list[Token]:
    return [token for token in tokens if names_token(case, token)][:most]
