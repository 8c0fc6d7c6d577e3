"""Writing of a bundle's parts, each rank its own.

No rank sends a row to another: rank 0 gathers the size and digest of each part.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist
from safetensors.torch import save
from torch import Tensor

from distbench.case.kinds import inputs_of
from distbench.case.spec import Case
from distbench.distributed.session import Session
from distbench.distributed.waits import collective
from distbench.errors import Verdict
from distbench.pipeline.inputs import workload_for
from distbench.pipeline.recorder import Finished, Recorder, Seen
from distbench.report.bundle.layout import (
    MAX_PART_BYTES,
    MAX_TOKENS,
    NOTHING_RECORDED,
    RECORDED_BYTES,
    ROUTING_BYTES,
    Part,
    Recorded,
    names_token,
    part_name,
    routed_tokens,
)
from distbench.report.files import write_atomically
from distbench.verify.diagnosis import lost_tokens
from distbench.verify.records import ORACLE, Gathered, Outcome, Token
from distbench.verify.row_compare import row_digests, tensor_digest
from distbench.verify.verdict import part_of, parts_of


def write_parts(session: Session, recorder: Recorder, folder: Path, outcome: Outcome | None) -> Recorded | None:
    """Write this rank's part of a failed case; on rank 0 return the record of all parts. Collective.

    Rank 0 alone passes the outcome, or None where the case did not fail and nothing is written. Of a case that ran with
    two kinds of inputs the failing one is recorded. A rank that cannot write is marked as missing in the manifest; the
    verdict stands.
    """
    if not recorder.parts or any(part.finished is None for part in recorder.parts.values()):
        return NOTHING_RECORDED  # refused before its first dispatch, on all ranks
    inputs = list(recorder.parts)
    known = failing_tokens(outcome) if outcome is not None else []
    taken = known[: _affordable(outcome.case)] if outcome is not None else []
    number = inputs.index(_failed_with(outcome, inputs)) if outcome is not None else -1
    told, tokens = _shared(session, taken, number)
    if told < 0:
        return None
    part = recorder.parts[inputs[told]]
    if part.finished is None:
        return None
    size, digest = _write_part(session.rank, part.seen, part.finished, folder, tokens)
    written = _everyones(session, size, digest)
    if outcome is None or outcome.gathered is None:
        return None
    hosts = [record.host for record in outcome.gathered.observations]
    parts = [_part(rank, host, row) for rank, (host, row) in enumerate(zip(hosts, written, strict=True))]
    left_out = max(_wrong_tokens(_failed_part(outcome) or outcome.gathered), len(known)) - len(taken)
    unrouted = _unrouted(outcome.case, routed_tokens(outcome.case.topk_slots))
    return Recorded(
        tokens=taken,
        left_out=left_out,
        parts=parts,
        routing_left_out=unrouted,
        inputs=inputs_of(outcome.case)[told] if len(inputs) > 1 else "",
    )


def _failed_with(outcome: Outcome, inputs: list[str]) -> str:
    """Kind of inputs with which a case failed."""
    findings = outcome.judgement.findings
    return findings[0].inputs if findings and findings[0].inputs in inputs else inputs[0]


def _failed_part(outcome: Outcome) -> Gathered | None:
    """Rank 0's gathered records for the kind of inputs with which a case failed."""
    if outcome.resolved is None or outcome.gathered is None:
        return outcome.gathered
    return part_of(parts_of(outcome.resolved, outcome.gathered), outcome.judgement.findings).gathered


def write_routing(folder: Path, case: Case, hosts: dict[int, str]) -> Recorded:
    """Write the routing of all ranks, which are lost, as parts: they can record nothing; any machine regenerates it."""
    workload = workload_for(case, torch.device("cpu"))
    routed = routed_tokens(case.topk_slots, min(ROUTING_BYTES, RECORDED_BYTES // case.ep_size))
    parts = []
    for rank, count in enumerate(case.tokens):
        content = save({"routing": workload.routing_of(rank, min(count, routed))})
        write_atomically(folder / part_name(rank), content)
        digest = hashlib.sha256(content).hexdigest()
        parts.append(Part(rank=rank, host=hosts.get(rank, "unknown"), size=len(content), sha256=digest))
    return Recorded(tokens=[], left_out=0, parts=parts, routing_left_out=_unrouted(case, routed))


def failing_tokens(outcome: Outcome) -> list[Token]:
    """Tokens that went wrong as far as rank 0 lists them: first divergences, differing, lost."""
    gathered = _failed_part(outcome)
    if gathered is None or outcome.judgement.verdict is Verdict.PASS:
        return []
    diverged = [
        (found.source_rank, found.source_token)
        for record in gathered.observations
        for found in record.divergences
        if found.source_rank is not None and found.source_token is not None
    ]
    differing = [token for listed in gathered.differing.values() for token in listed]
    named = dict.fromkeys([*diverged, *differing, *lost_tokens(gathered)])
    found = [token for token in named if names_token(outcome.case, token)]
    return found or [(record.rank, 0) for record in gathered.observations if record.tokens][:1]


def _wrong_tokens(gathered: Gathered) -> int:
    """Least number of tokens that went wrong: each of these counts has a token once."""
    differing = [found.differing_tokens for found in gathered.comparisons.values()]
    lost = [record.lost.rows for record in gathered.observations]
    wrong = [found.rows for record in gathered.observations for found in record.divergences if found.evidence.tokens]
    return max([*differing, *lost, *wrong], default=0)


def _unrouted(case: Case, routed: int) -> int:
    """Number of tokens beyond the first `routed` of each rank."""
    return sum(max(count - routed, 0) for count in case.tokens)


def _affordable(case: Case) -> int:
    """Number of tokens that fit into `RECORDED_BYTES`: their rows on every rank that they go to, in every arm."""
    arms, element = 4, 2
    row = case.hidden_size * 3 * element + 12 * case.topk_slots
    token = arms * (min(case.topk_slots, case.ep_size) * row + case.hidden_size * element) + row
    return max(min(RECORDED_BYTES // token, MAX_TOKENS), 1)


def _shared(session: Session, tokens: list[Token], part: int) -> tuple[int, Tensor]:
    """Rank 0's part, -1 where the case did not fail, and its tokens int64 [t, 2] on the CPU, on all ranks."""
    sent = torch.full((1 + MAX_TOKENS, 2), -1, dtype=torch.int64)
    sent[0] = part
    if tokens:
        sent[1 : 1 + len(tokens)] = torch.tensor(tokens)
    sent = sent.to(session.device)
    with collective("broadcast", sent.get_device()):
        dist.broadcast(sent, group=session.group, group_src=0)
    (told, *_), *_ = sent.tolist()
    listed = sent[1:].cpu()
    return told, listed[listed[:, 0] >= 0]


def _write_part(
    rank: int, seen: dict[str, Seen], finished: Finished, folder: Path, tokens: Tensor
) -> tuple[int, bytes]:
    """Write the part of `rank`; return its size and digest, or -1 where it could not be written or is too large."""
    tensors = _own_tokens(rank, finished, tokens)
    for arm, one in seen.items():
        tensors |= {f"{arm}.{name}": tensor for name, tensor in _rows(rank, one, finished, tokens).items()}
    content = save(
        {name: _storable(tensor.cpu().contiguous()) for name, tensor in tensors.items()},
        {"digests": msgspec.json.encode(_digests(seen, finished)).decode()},
    )
    if len(content) > MAX_PART_BYTES:
        return -1, bytes(32)
    try:
        write_atomically(folder / part_name(rank), content)
    except OSError:
        return -1, bytes(32)
    return len(content), hashlib.sha256(content).digest()


def _storable(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.dtype is torch.float8_e4m3fnuz else tensor


def _own_tokens(rank: int, finished: Finished, tokens: Tensor) -> dict[str, Tensor]:
    batch, outputs = finished.batch, finished.outputs
    index = tokens[tokens[:, 0] == rank, 1]
    chosen = index.to(batch.ids.device)
    routed = routed_tokens(batch.ids.shape[1])
    found = {"routing": batch.ids[:routed].clone(), "token.index": index}
    found |= {f"token.{name}": part[chosen] for name, part in batch._asdict().items() if part is not None}
    found |= {f"combined.{arm}": rows[chosen] for arm, rows in outputs.items() if arm != ORACLE}
    if ORACLE in outputs:
        found["token.oracle"] = outputs[ORACLE][chosen]
    return found


def _rows(rank: int, seen: Seen, finished: Finished, tokens: Tensor) -> dict[str, Tensor]:
    """Rows of `tokens` as they arrived, their slots in the buffer, and their expert rows."""
    keys = _keys(seen.sources)
    found_at = torch.isin(keys, _keys(tokens)).nonzero().flatten()
    first = {key: slot for slot, key in zip(found_at.tolist()[::-1], keys[found_at].tolist()[::-1], strict=True)}
    wanted = torch.tensor(sorted(first.values()), dtype=torch.int64)  # each token once, even if a transport repeats it
    live = wanted[wanted < seen.expert_rows.shape[0]]
    cut = wanted[wanted >= seen.expert_rows.shape[0]]
    found = {
        "sources": seen.sources[live],
        "slots": live,
        "experts": seen.expert_rows[live],
        "cut": torch.cat([seen.sources[cut], cut.unsqueeze(1)], dim=1),
    }
    found |= {name: part[live] for name, part in seen.received._asdict().items() if part is not None}
    workload = finished.workload
    if _in_range(seen.sources[live], workload.tokens_per_rank):
        batch = workload.token_rows(*seen.sources[live].unbind(1))
        oracle = workload.expected_rows(rank, batch)
        if oracle is not None:
            found[ORACLE] = oracle
    return found


def _in_range(sources: Tensor, tokens_per_rank: tuple[int, ...]) -> bool:
    """Whether sources [m, 2], which a faulty transport may have damaged, name existing tokens."""
    held = torch.tensor(tokens_per_rank)
    ranks = sources[:, 0].clamp(0, len(tokens_per_rank) - 1)
    return bool(((sources >= 0).all(1) & (sources[:, 0] == ranks) & (sources[:, 1] < held[ranks])).all())


def _digests(seen: dict[str, Seen], finished: Finished) -> dict[str, str]:
    """Digests of all rows, recorded or not: sources, experts' weights, received and expert rows by source."""
    found = {f"token.{name}": _digest(part) for name, part in finished.batch._asdict().items() if part is not None}
    found |= {f"combined.{arm}": _digest(rows) for arm, rows in finished.outputs.items()}
    found |= {name: _digest(getattr(finished.weights, name).flatten(0, 1)) for name in ("w1", "w2")}
    for arm, one in seen.items():
        order = _keys(one.sources[: one.expert_rows.shape[0]]).argsort(stable=True)
        received = {name: part[order] for name, part in one.received._asdict().items() if part is not None}
        found |= {f"{arm}.{name}": _digest(part) for name, part in received.items()}
        found[f"{arm}.experts"] = _digest(one.expert_rows[order])
    return found


def _digest(rows: Tensor) -> str:
    return tensor_digest(row_digests(rows))


def _keys(sources: Tensor) -> Tensor:
    return (sources[:, 0] << 32) | sources[:, 1]


def _everyones(session: Session, size: int, digest: bytes) -> list[list[int]]:
    """Size and digest words of every rank's part on rank 0, nothing elsewhere."""
    words = torch.frombuffer(bytearray(digest), dtype=torch.int64)
    found: list[list[int]] = session.gathered(torch.cat([torch.tensor([size]), words])).tolist()
    return found


def _part(rank: int, host: str, row: list[int]) -> Part:
    size, *words = row
    if size < 0:
        return Part(rank=rank, host=host, missing="could not be written, or came out too large")
    digest = b"".join(word.to_bytes(8, "little", signed=True) for word in words)
    return Part(rank=rank, host=host, size=size, sha256=digest.hex())
