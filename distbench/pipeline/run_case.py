"""A case on the ranks: agree on it, run its arms, gather, judge."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import torch
from torch import Tensor

from distbench.case.identity import case_hash
from distbench.case.kinds import inputs_of, with_inputs
from distbench.case.limits import Traffic, check_capacity
from distbench.case.plugins import Plugin
from distbench.case.spec import Case
from distbench.case.stages import TIMED_ARMS, Stage
from distbench.case.timeouts import compiles
from distbench.distributed.session import Session
from distbench.errors import InvalidCase, Overflow, Unsupported
from distbench.experts import make_experts
from distbench.experts.base import Experts, ExpertWeights
from distbench.pipeline.graphs import GraphedExperts, prove_capture
from distbench.pipeline.inputs import workload_for
from distbench.pipeline.observer import Observer
from distbench.pipeline.parts import Parts
from distbench.pipeline.passes import Passes
from distbench.pipeline.production_rows import production_rows
from distbench.pipeline.recorder import Recorder
from distbench.pipeline.recv_bound import limit_rows
from distbench.pipeline.sent_rows import sent_rows
from distbench.pipeline.sub_batches import SubBatch, first_tokens, on_streams, split_batch
from distbench.pipeline.truncation import arms_of
from distbench.transport import make_transport
from distbench.transport.base import Transport
from distbench.utils.process import peak_bytes
from distbench.verify.diagnosis import diagnose
from distbench.verify.gather import Outputs, choose_mode, gather, outputs_of
from distbench.verify.records import Gathered, Judgement, Observation, Outcome, Reason, ResolvedCase
from distbench.verify.row_compare import row_digests
from distbench.verify.verdict import judge
from distbench.workload.batch import TokenBatch
from distbench.workload.inputs import Workload
from distbench.workload.routing import recv_counts

if TYPE_CHECKING:
    from distbench.callers.base import Caller
    from distbench.faults.injector import Injector

_PROBED_TOKENS = 2


class _Inputs(NamedTuple):
    """One kind of inputs: the case's workload, and this rank's tokens."""

    workload: Workload
    batch: TokenBatch


class _Ready(NamedTuple):
    """A case that is ready for its first dispatch.

    The resolved case, the kinds of inputs, the weights and the experts of the first kind, the transports of each
    sub-batch or the one, and their agreed counts [batches, W, W]. `weights`, `experts` and `callers`, which hold
    experts, are lists so that their user can take out the last reference: experts keep tensors derived from
    weights, and two sets of weights may not fit into memory.
    """

    resolved: ResolvedCase
    inputs: list[_Inputs]
    weights: list[ExpertWeights]
    transports: list[Transport]
    experts: list[Experts]
    callers: list[Caller | None]
    counts: Tensor
    brought: Brought


class _Seen(NamedTuple):
    """One rank's results for one kind of inputs."""

    observation: Observation
    outputs: Outputs
    injector: Injector | None


class Brought(NamedTuple):
    """Parts that the process of the ranks brings itself, for names of the case that lead nowhere else."""

    transport: Plugin | None = None
    experts: Plugin | None = None


@torch.inference_mode()
def run_case(
    session: Session, case: Case, recorder: Recorder | None = None, brought: Brought | None = None
) -> Outcome | None:
    """Run all arms of `case` and judge them: the outcome on rank 0, None elsewhere. Collective.

    `brought` are parts of this process, in place of those that the case names.
    `recorder`, on all ranks or none, keeps this rank's rows for a bundle. A case that is refused before its first
    dispatch is refused by all ranks, and its outcome is known to all. A later refusal may be one rank's own: it is
    raised like any other error, and ends the rank.
    """
    session.heartbeat.arm, session.heartbeat.repeat = "", 0
    try:
        ready = _prepare(session, case, brought)
    except (InvalidCase, Overflow, Unsupported) as error:
        reason = Reason(code=error.verdict.value.lower(), message=str(error))
        return Outcome(case, Judgement(error.verdict, [reason], None))
    return _run(session, ready, recorder)


def _prepare(session: Session, case: Case, brought: Brought | None = None) -> _Ready:
    session.heartbeat.mark(Stage.AGREE)
    session.use(case.device, shared=case.share_devices)
    if case.inject:
        from distbench.faults.injector import check_plugins  # noqa: PLC0415 - loaded only where faults are asked for

        check_plugins(session, case)
    workloads = [workload_for(with_inputs(case, kind), session.device) for kind in inputs_of(case)]
    batches, probe = _tokens_and_probe(workloads, session.rank)
    parts = split_batch(case, batches[0], session.rank) if case.two_batch_overlap else (batches[0],)
    sent = torch.cat([recv_counts(part.ids, case.experts_per_rank, case.ep_size) for part in parts])
    counts = session.agree(case_hash(case), probe, sent)
    counts = counts.view(case.ep_size, len(parts), case.ep_size).transpose(0, 1)
    resolved = _resolved(session, case, counts)
    session.heartbeat.mark(Stage.WORKLOAD)
    inputs = [_Inputs(*one) for one in zip(workloads, batches, strict=True)]
    return _build(session, resolved, inputs, counts, brought or Brought())


def _run(session: Session, ready: _Ready, recorder: Recorder | None) -> Outcome | None:
    """Run the case with each kind of inputs, with the same routing, transport and experts; gather all together."""
    case = ready.resolved.case
    found = []
    for number in range(len(ready.inputs)):
        found.append(_run_with(session, ready, number, recorder))
        if case.caller != "own":
            gc.collect()  # lifted functions and their globals hold each other, and the experts with their weights
    for transport in ready.transports:
        transport.close()
    mode = choose_mode(case.gather, case.tokens, sum(one.outputs.rows[:1].nbytes for one in found))
    peak = peak_bytes()  # of the process, after all passes: an observation of the first inputs is of before the second
    seen = [(msgspec.structs.replace(one.observation, peak_bytes=peak), one.outputs) for one in found]
    gathered = gather(session, mode, case.tokens, seen)
    injector = found[-1].injector
    if injector is not None:
        injector.leave()
    return None if gathered is None else _judged(ready, gathered)


def _run_with(session: Session, ready: _Ready, number: int, recorder: Recorder | None) -> _Seen:
    kind, inputs = inputs_of(ready.resolved.case)[number], ready.inputs[number]
    resolved = msgspec.structs.replace(ready.resolved, case=with_inputs(ready.resolved.case, kind))
    if number:
        session.heartbeat.mark(Stage.WORKLOAD)
        ready.weights.append(_weights(session, resolved.case, inputs.workload))
        experts = _make_experts(resolved.case, ready.brought)
        ready.callers.append(_caller(session, resolved, experts))
        ready.experts.append(GraphedExperts(experts) if resolved.case.graph is True else experts)
    parts = Parts(inputs.workload, inputs.batch, ready.weights.pop(), ready.transports[0], ready.experts.pop())
    if resolved.case.two_batch_overlap:
        parts = parts._replace(sub_batches=_sub_batches(session, resolved.case, parts, ready.transports))
    parts = _inject(session, resolved.case, parts._replace(caller=ready.callers.pop()))
    session.heartbeat.mark(Stage.CHECK)  # the observer computes the oracle
    observer = Observer(session, resolved, parts, ready.counts, None if recorder is None else recorder.part(kind))
    measured = Passes(session, resolved, parts, observer).run()
    outputs = outputs_of(observer.outputs)
    return _Seen(observer.observation(outputs, measured, mapped=not number), outputs, parts.injector)


def _judged(ready: _Ready, gathered: list[Gathered]) -> Outcome:
    resolved, (first, *others) = ready.resolved, gathered
    whole = msgspec.structs.replace(first, gaussian=others[0]) if others else first
    judgement = judge(resolved, whole)
    sent = sent_rows(ready.counts.sum(0), [record.host for record in whole.observations])
    return Outcome(resolved.case, judgement, resolved, whole, diagnose(resolved, whole, judgement), sent=sent)


def _tokens_and_probe(workloads: list[Workload], rank: int) -> tuple[list[TokenBatch], Tensor]:
    """The rank's tokens of each kind of inputs, and digests of tokens that all ranks generate alike, int64.

    The ranks differ in the digests if one computes otherwise.
    """
    count, device = workloads[0].tokens_per_rank[rank], workloads[0].device
    tokens = torch.arange(count + _PROBED_TOKENS, device=device)
    probes = tokens >= count
    ranks, tokens = (~probes) * rank, tokens - probes * count
    batches, shared = [], []
    for workload in workloads:
        rows = workload.token_rows(ranks, tokens)
        scales = None if rows.scales is None else rows.scales[:count]
        batches.append(TokenBatch(rows.hidden[:count], scales, rows.weights[:count], rows.ids[:count]))
        shared += [part[count:].contiguous().view(torch.uint8) for part in rows if part is not None]
    return batches, row_digests(torch.cat(shared, dim=1)).flatten()


def _resolved(session: Session, case: Case, counts: Tensor) -> ResolvedCase:
    traffic = Traffic(case.tokens, tuple(counts.sum((0, 1)).tolist()), case.capacity)
    parts = tuple(
        Traffic(tokens, tuple(sent.sum(0).tolist()), case.capacity)
        for tokens, sent in zip(case.sub_batch_tokens, counts, strict=False)
    )
    resolved = ResolvedCase(case, traffic, None, parts)
    check_capacity(resolved.per_call, case.max_dispatch_tokens_per_rank)
    limit = limit_rows(case, resolved.per_call, session.local_ranks)
    return msgspec.structs.replace(resolved, limit=limit)


def _build(session: Session, resolved: ResolvedCase, inputs: list[_Inputs], counts: Tensor, brought: Brought) -> _Ready:
    case, (workload, batch), limit = resolved.case, inputs[0], resolved.limit
    weights = _weights(session, case, workload)
    rows = (case.capacity, *((limit,) if limit else ()))
    if case.caller != "own":
        rows = (*rows, production_rows(resolved, session.rank, session.local_ranks))
    if compiles(case):  # as packages are imported, as MoRI's world and operator are made, and in warm_up
        session.heartbeat.mark(Stage.COMPILE)
    with session.together() if compiles(case) or case.graph else nullcontext():
        experts = _make_experts(case, brought)
        experts.warm_up(weights, rows)
        graphed = _graphed(session, experts, weights, batch, rows) if case.graph else experts
        experts = experts if case.graph == "layer" else graphed
    caller = _caller(session, resolved, experts)
    own = () if brought.transport is None else (brought.transport,)
    transports = [make_transport(session, case, sent, batch, *own) for sent in counts]
    if case.two_batch_overlap:
        transports = on_streams(case, transports, session.device)
    if case.graph == "layer":
        from distbench.pipeline.layer_graph import prove_layer  # noqa: PLC0415 - only with that key

        with session.together():
            arms = arms_of(limit, case.policy, refused=resolved.refused)
            parts = Parts(workload, batch, weights, transports[0], experts)
            prove_layer(parts, {arm: cut for arm, cut in arms.items() if arm in TIMED_ARMS})
    return _Ready(resolved, inputs, [weights], transports, [experts], [caller], counts, brought)


def _make_experts(case: Case, brought: Brought) -> Experts:
    return make_experts(case) if brought.experts is None else make_experts(case, brought.experts)


def _sub_batches(session: Session, case: Case, parts: Parts, transports: list[Transport]) -> tuple[SubBatch, ...]:
    sides = zip(
        split_batch(case, parts.batch, session.rank), first_tokens(case, session.device), transports, strict=True
    )
    return tuple(SubBatch(place, *side, parts.experts) for place, side in enumerate(sides))


def _caller(session: Session, resolved: ResolvedCase, experts: Experts) -> Caller | None:
    if resolved.case.caller == "own":
        return None
    from distbench.pipeline.production import caller_of  # noqa: PLC0415 - nothing of it is loaded without a caller

    return caller_of(session, resolved, experts)


def _weights(session: Session, case: Case, workload: Workload) -> ExpertWeights:
    mask = _local_mask(case.placed_experts, session.rank * case.experts_per_rank, case.experts_per_rank, session.device)
    return ExpertWeights(*workload.local_weights(session.rank), mask, *(workload.local_biases(session.rank) or ()))


def _local_mask(num_experts: int, first: int, count: int, device: torch.device) -> Tensor:
    """Return the mask int32 [E] of local experts: its own for each case, since experts may write to it by mistake."""
    mask = torch.zeros(num_experts, dtype=torch.int32, device=device)
    mask[first : first + count] = 1
    return mask


def _graphed(
    session: Session, experts: Experts, weights: ExpertWeights, batch: TokenBatch, rows: tuple[int, ...]
) -> Experts:
    """The experts in graphs, each number of rows captured once in advance: a pass could not refuse a capture."""
    if session.device.type == "cpu":
        message = "graph: CUDA graphs need a device, and this case runs on the CPU; drop --graph or use --device cuda"
        raise Unsupported(message)
    for count in rows:
        prove_capture(experts, weights, batch, count)
    return GraphedExperts(experts)


def _inject(session: Session, case: Case, parts: Parts) -> Parts:
    """The parts with the case's faults around them; faults restart with each kind of inputs."""
    if not case.inject:
        return parts
    from distbench.faults.injector import Injector, inject_both  # noqa: PLC0415 - loaded only where faults are asked for

    if parts.sub_batches:
        injectors = inject_both(session, case, parts.sub_batches)
        sides = zip(parts.sub_batches, injectors, strict=True)
        faulty = tuple(
            one._replace(transport=around.transport, experts=around.experts, around=around.around)
            for one, around in sides
        )
        return parts._replace(sub_batches=faulty, injector=injectors[0])
    injector = Injector(session, case, parts.transport, parts.experts)
    return parts._replace(transport=injector.transport, experts=injector.experts, injector=injector)
