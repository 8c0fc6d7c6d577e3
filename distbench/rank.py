"""What the ranks do with a case: agree on it, run its arms, gather, judge."""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from distbench.case import Case, case_hash
from distbench.errors import InvalidCase, Overflow, Unsupported
from distbench.experts import make_experts
from distbench.experts.base import CompiledExperts, Experts
from distbench.experts.roundings import stored_intermediate
from distbench.graphs import GraphedExperts, prove_capture
from distbench.layer import ExpertWeights
from distbench.limits import Traffic, check_capacity, resolve_limit
from distbench.passes import Parts, Passes
from distbench.recording import Recorder
from distbench.recv_bound import recv_bound
from distbench.session import Session
from distbench.stage_limits import compiles
from distbench.transport import make_transport
from distbench.verify.bitwise import row_digests
from distbench.verify.diagnosis import diagnose
from distbench.verify.gather import choose_mode, gather, outputs_of
from distbench.verify.records import Judgement, Outcome, Question, Reason
from distbench.verify.verdict import judge
from distbench.workload.batch import TokenBatch
from distbench.workload.inputs import Workload, make_workload
from distbench.workload.routing import recv_counts

_PROBED_TOKENS = 2


class _Ready(NamedTuple):
    """A case whose first dispatch is next: what is asked, the parts it runs with, and the agreed counts [W, W]."""

    question: Question
    parts: Parts
    counts: Tensor


@torch.inference_mode()
def run_case(session: Session, case: Case, recorder: Recorder | None = None) -> Outcome | None:
    """Run all arms of `case` and judge them: the outcome on rank 0, None elsewhere. Collective.

    `recorder`, on all ranks or none, keeps this rank's rows for a bundle.
    A case that is refused before its first dispatch is refused by all ranks alike, and its outcome is known to all.
    From there on a refusal may be one rank's own: it is raised like any other error, and ends the rank.
    """
    session.crumbs.arm = ""
    try:
        ready = _prepare(session, case)
    except (InvalidCase, Overflow, Unsupported) as error:
        reason = Reason(code=error.verdict.value.lower(), message=str(error))
        return Outcome(case, Judgement(error.verdict, [reason], None))
    return _run(session, ready, recorder)


def _prepare(session: Session, case: Case) -> _Ready:
    session.crumbs.mark("agree")
    session.use(case.device)
    workload = workload_for(case, session.device)
    batch, probe = _tokens_and_probe(workload, session.rank)
    sent = recv_counts(batch.ids, case.experts_per_rank, case.ep_size)
    counts = session.agree(case_hash(case), probe, sent)
    question = _question(session, case, counts)
    session.crumbs.mark("workload")
    return _Ready(question, _build(session, case, workload, batch, counts, question.limit), counts)


def _run(session: Session, ready: _Ready, recorder: Recorder | None) -> Outcome | None:
    question, parts, counts = ready
    case = question.case
    passes = Passes(session, question, parts, counts, recorder)
    passes.run()
    parts.transport.close()
    outputs = outputs_of(passes.outputs)
    mode = choose_mode(case.gather, case.tokens, outputs.rows[:1].nbytes)
    gathered = gather(session, mode, case.tokens, passes.observation(outputs), outputs)
    if parts.injector is not None:
        parts.injector.leave()
    if gathered is None:
        return None
    judgement = judge(question, gathered)
    return Outcome(case, judgement, question, gathered, diagnose(question, gathered, judgement))


def workload_for(case: Case, device: torch.device) -> Workload:
    """Return the case's inputs.

    Raises:
        InvalidCase: the routing does not fit the ranks, or the shape cannot be exact.

    """
    return make_workload(
        numerics=case.numerics,
        hidden_size=case.hidden_size,
        intermediate_size=case.intermediate_size,
        num_experts=case.num_experts,
        topk=case.topk,
        ep_size=case.ep_size,
        seed=case.seed,
        routing=case.routing,
        tokens_per_rank=case.tokens,
        dispatch_dtype=case.dispatch_dtype,
        fp8_format=case.fp8_format,
        combine_quant=case.combine_quant,
        intermediate=stored_intermediate(case),
        device=device,
    )


def _tokens_and_probe(workload: Workload, rank: int) -> tuple[TokenBatch, Tensor]:
    """Return the rank's tokens, and digests int64 of some that every rank makes alike if it computes as the others."""
    count = workload.tokens_per_rank[rank]
    probed = torch.arange(_PROBED_TOKENS, device=workload.device)
    ranks = torch.cat([probed.new_full((count,), rank), torch.zeros_like(probed)])
    rows = workload.token_rows(ranks, torch.cat([torch.arange(count, device=workload.device), probed]))
    scales = None if rows.scales is None else rows.scales[:count]
    mine = TokenBatch(rows.hidden[:count], scales, rows.weights[:count], rows.ids[:count])
    shared = [part[count:].contiguous().view(torch.uint8) for part in rows if part is not None]
    return mine, row_digests(torch.cat(shared, dim=1)).flatten()


def _question(session: Session, case: Case, counts: Tensor) -> Question:
    traffic = Traffic(case.tokens, tuple(counts.sum(0).tolist()), case.capacity)
    check_capacity(traffic, case.max_dispatch_tokens_per_rank)
    limit = resolve_limit(case.limit, traffic)
    if limit is None and case.recv_bound:
        limit = recv_bound(case, session.local_ranks).rows
    return Question(case, traffic, limit)


def _build(  # noqa: PLR0913 - what parts are made of
    session: Session, case: Case, workload: Workload, batch: TokenBatch, counts: Tensor, limit: int | None
) -> Parts:
    mask = torch.zeros(case.num_experts, dtype=torch.int32, device=session.device)
    mask[session.rank * case.experts_per_rank : (session.rank + 1) * case.experts_per_rank] = 1
    weights = ExpertWeights(*workload.local_weights(session.rank), mask)
    rows = (case.capacity, *((limit,) if limit else ()))
    if compiles(case):  # as packages are imported, as MoRI's world and operator are made, and in warm_up
        session.crumbs.mark("compile")
    with session.together() if compiles(case) or case.graph else nullcontext():
        experts = make_experts(case)
        if case.experts != "reference" and isinstance(experts, CompiledExperts):
            experts.warm_up(*weights, rows=rows)
        experts = _graphed(session, experts, weights, batch, rows) if case.graph else experts
    parts = Parts(
        workload=workload,
        batch=batch,
        weights=weights,
        transport=make_transport(session, case, counts, batch),
        experts=experts,
    )
    return _inject(session, case, parts) if case.inject else parts


def _graphed(
    session: Session, experts: Experts, weights: ExpertWeights, batch: TokenBatch, rows: tuple[int, ...]
) -> Experts:
    """Return the experts in graphs, after each number of rows has been captured once: a pass could not refuse it."""
    if session.device.type == "cpu":
        message = "graph: CUDA graphs need a device, and this case runs on the CPU; drop --graph or use --device cuda"
        raise Unsupported(message)
    for count in rows:
        prove_capture(experts, weights, batch, count)
    return GraphedExperts(experts)


def _inject(session: Session, case: Case, parts: Parts) -> Parts:
    from distbench.faults.injector import Injector  # noqa: PLC0415 - nothing of it is loaded where no fault is asked for

    injector = Injector(session, case, parts.transport, parts.experts)
    return parts._replace(transport=injector.transport, experts=injector.experts, injector=injector)
