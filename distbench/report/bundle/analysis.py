"""Analysis of a bundle by itself: its recorded tensors against inputs and oracle.

These are generated again on this machine, or taken as recorded where they are of another version.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from distbench.case.kinds import inputs_of, with_inputs
from distbench.case.spec import Case
from distbench.case.stages import Arm, Stage
from distbench.errors import InvalidCase
from distbench.report.bundle.findings import INPUTS, SENT, SUM, Analysis, StageFinding
from distbench.report.bundle.layout import Part, part_name
from distbench.report.bundle.read import Bundle, local_case, read_part
from distbench.report.bundle.recorded import (
    ArmRows,
    RankTensors,
    moves_local_slots,
    rank_tensors,
    recorded_order,
    routing_of,
)
from distbench.report.bundle.references import AsRecorded, Generated, References, SentTokens
from distbench.transport.sum_order import SumOrder
from distbench.utils.text import one_line
from distbench.verify.combine_model import added, same_bits_or_nan, slots_of
from distbench.verify.diagnosis import diagnose
from distbench.verify.records import ORACLE, Divergence, Gathered
from distbench.verify.row_compare import bits_at, differing
from distbench.verify.verdict import judge
from distbench.workload.batch import TokenBatch
from distbench.workload.routing import destinations, local_slots
from distbench.workload.routing_spec import ExpertGroup
from distbench.workload.version import INPUTS_VERSION

_RECORDED_FIELDS = (*TokenBatch._fields, "rows", "tokens")
_BORNE_OUT_BY: Mapping[str, tuple[str, ...]] = {
    Stage.DISPATCH: (Stage.DISPATCH,),
    Stage.TRUNCATE: (Stage.TRUNCATE, Stage.DISPATCH),  # rows are recorded as the experts received them: after the cut
    Stage.EXPERTS: (Stage.EXPERTS,),
    Stage.COMBINE: (Stage.COMBINE, SUM),
}


# Findings that need no regenerated input: another torch may generate others than those recorded, and its oracle says
# nothing of them.
_WITHOUT_INPUTS = (INPUTS, SUM)


class _Sums(NamedTuple):
    """Expert rows by (arm, source rank, source token) and the rank that made them; tokens that were cut have None."""

    rows: dict[tuple[str, int, int], dict[int, Tensor | None]]
    combined: dict[tuple[str, int, int], Tensor]
    ids: dict[tuple[int, int], list[int]]


class _Slots(NamedTuple):
    """Slots of a row that the transport moves: all of them, or those of the receiver's `experts_per_rank` experts."""

    experts_per_rank: int
    local_only: bool

    def moved(self, rank: int, batch: TokenBatch) -> TokenBatch:
        """The rows as they arrive on `rank`."""
        return local_slots(batch, rank, self.experts_per_rank) if self.local_only else batch


def analyse(bundle: Bundle) -> Analysis:
    """Check every recorded stage and judge the case again, with the stages as found here.

    Where the inputs regenerated here are not those recorded, only sums are checked, and the recorded stages are judged.

    Raises:
        InvalidCase: a part is damaged, or the record contradicts itself.

    """
    case, gathered = local_case(bundle), bundle.manifest.gathered
    missing = _missing(bundle)
    present = [part for part in bundle.manifest.recorded.parts if part.rank not in missing]
    references = _references(bundle, present)
    facts = {} if gathered is None else gathered.observations[0].transport
    slots = _Slots(case.experts_per_rank, moves_local_slots(facts))
    findings: list[StageFinding] = []
    kept: list[StageFinding] = []
    sums = _Sums(defaultdict(dict), {}, {})
    for part in present:
        tensors = _loaded(bundle, part)
        with _one_story(bundle, part):
            if gathered is None:
                findings.append(references.inputs(part.rank, routing_of(part.rank, tensors, case), None))
                continue
            recorded = rank_tensors(part.rank, tensors, case, bundle.manifest.recorded.tokens)
            kept.append(references.kept(part.rank, recorded))
            findings += _own_tokens(part.rank, recorded, references, sums)
            findings += _arms(part.rank, recorded.arms, references, sums, slots)
    if gathered is not None and not missing:
        findings += _summed(case, recorded_order(gathered.observations[0].transport), sums)
    findings += _overwritten(kept) if gathered is not None and _made_the_same(gathered, findings) else kept
    if any(found.stage == INPUTS and found.wrong for found in findings):
        findings = [found for found in findings if found.stage in _WITHOUT_INPUTS]
        return _judged(bundle, findings, list(missing.values()), confirmed=False)
    return _judged(bundle, findings, list(missing.values()), confirmed=not missing)


def _made_the_same(gathered: Gathered, findings: list[StageFinding]) -> bool:
    """Whether received rows show that the ranks generated the inputs that are generated here.

    Those that were right there are right here: no rank and arm has wrong ones that had none in the run.
    """
    received = [found for found in findings if found.stage == Stage.DISPATCH]
    known = {
        (record.rank, one.arm)
        for record in gathered.observations
        for one in record.divergences
        if (one.stage, one.against) == (Stage.DISPATCH, "source")
    }
    return any(found.rows for found in received) and {(one.rank, one.arm) for one in received if one.wrong} <= known


def _overwritten(kept: list[StageFinding]) -> list[StageFinding]:
    """Findings of tokens, where those that are wrong were overwritten after they were made."""
    return [msgspec.structs.replace(found, stage=SENT) if found.wrong else found for found in kept]


def _missing(bundle: Bundle) -> dict[int, str]:
    """Parts that cannot be read, by rank, in words."""
    return {
        part.rank: f"{part_name(part.rank)} (of {part.host}): {part.missing or 'not in this folder'}"
        for part in bundle.manifest.recorded.parts
        if part.missing or not (bundle.folder / part_name(part.rank)).exists()
    }


def _references(bundle: Bundle, present: list[Part]) -> References:
    """Inputs and oracle: generated where this version generates the recorded inputs, else those in the parts."""
    case, recorded = local_case(bundle), bundle.manifest.recorded
    inputs = recorded.inputs or inputs_of(case)[0]
    if bundle.manifest.inputs_version == INPUTS_VERSION:
        return Generated(with_inputs(case, inputs))
    sent = []
    for part in present if bundle.manifest.gathered is not None else ():
        tensors = _loaded(bundle, part)
        with _one_story(bundle, part):
            own = rank_tensors(part.rank, tensors, case, recorded.tokens)
            sent.append(SentTokens(part.rank, own.tokens, own.sent))
    return AsRecorded(sent, exact=inputs == "exact")


@contextlib.contextmanager
def _one_story(bundle: Bundle, part: Part) -> Iterator[None]:
    """Refuse the bundle where its part contradicts itself."""
    try:
        yield
    except (LookupError, ValueError, RuntimeError) as error:
        message = f"bundle {bundle.folder}: {part_name(part.rank)}: contradicts itself ({one_line(error)})"
        raise InvalidCase(message) from error


def _loaded(bundle: Bundle, part: Part) -> dict[str, Tensor]:
    content = read_part(bundle, part).content
    try:
        tensors: dict[str, Tensor] = load(content)
    except SafetensorError as error:
        message = f"bundle {bundle.folder}: {part_name(part.rank)}: {one_line(error)}"
        raise InvalidCase(message) from error
    return tensors


def _own_tokens(rank: int, recorded: RankTensors, references: References, sums: _Sums) -> list[StageFinding]:
    """Check a rank's routing and failing tokens: its inputs, and the results against the oracle."""
    index = recorded.tokens
    batch = references.sent(rank, recorded)
    findings = [references.inputs(rank, recorded.routing, recorded)]
    oracle = references.combined(recorded, batch)
    for arm, combined in recorded.combined.items():
        for place, token in enumerate(index.tolist()):
            sums.combined[arm, rank, token] = combined[place]
        if oracle is not None:
            sources = torch.stack([torch.full_like(index, rank), index], dim=1)
            tokens = _Place(rank, arm, Stage.COMBINE, sources, index)
            findings.append(tokens.compare("tokens", ORACLE, combined, oracle))
    sums.ids.update({(rank, token): row for token, row in zip(index.tolist(), batch.ids.tolist(), strict=True)})
    return findings


def _arms(rank: int, arms: list[ArmRows], references: References, sums: _Sums, slots: _Slots) -> list[StageFinding]:
    """Check the rows that a rank received: fields against their sources, expert rows against oracle or padded arm."""
    findings = []
    baseline: dict[tuple[int, ...], Tensor] = {}
    for rows in arms:
        known, batch = references.received(rows.sources)
        dispatch = _Place(rank, rows.arm, Stage.DISPATCH, rows.sources[known], rows.slots[known])
        fields = [
            dispatch.compare(name, "source", actual[known], expected)
            for name, actual, expected in zip(batch._fields, rows.received, slots.moved(rank, batch), strict=True)
            if actual is not None and expected is not None
        ]
        findings.append(max(fields, key=lambda found: found.wrong))
        findings.append(_cut(rank, rows))
        oracle, against = references.expert_rows(rank, rows, batch), ORACLE
        if oracle is None:
            oracle, against = _first_seen(baseline, rows), Arm.PADDED
        experts = _Place(rank, rows.arm, Stage.EXPERTS, rows.sources, rows.slots)
        findings.append(experts.compare("rows", against, rows.experts, oracle))
        for (owner, token), row in zip(rows.sources.tolist(), rows.experts, strict=True):
            sums.rows[rows.arm, owner, token][rank] = row
        for owner, token, _ in rows.cut.tolist():
            sums.rows[rows.arm, owner, token][rank] = None
    return findings


def _first_seen(known: dict[tuple[int, ...], Tensor], rows: ArmRows) -> Tensor:
    """For each row, the first arm's expert row: bf16 [m, H]."""
    found = torch.empty_like(rows.experts)
    for place, source in enumerate(rows.sources.tolist()):
        found[place] = known.setdefault(tuple(source), rows.experts[place])
    return found


class _Place(NamedTuple):
    """Places of recorded rows: sources int64 [m, 2], slots (or tokens) int64 [m]."""

    rank: int
    arm: str
    stage: str
    sources: Tensor
    slots: Tensor

    def compare(self, field: str, against: str, actual: Tensor, expected: Tensor) -> StageFinding:
        wrong = differing(actual, expected)
        rows = wrong.any(1)
        finding = StageFinding(rank=self.rank, arm=self.arm, stage=self.stage, rows=len(actual), wrong=int(rows.sum()))
        if not finding.wrong:
            return finding
        row = int(rows.int().argmax())
        column = int(wrong[row].int().argmax())
        source_rank, source_token = self.sources[row].tolist()
        first = Divergence(
            stage=self.stage,
            arm=self.arm,
            rank=self.rank,
            source_rank=source_rank,
            source_token=source_token,
            row=int(self.slots[row]),
            column=column,
            expected_bits=bits_at(expected, row, column),
            actual_bits=bits_at(actual, row, column),
            field=field,
            against=against,
            rows=finding.wrong,
        )
        return msgspec.structs.replace(finding, first=first)


def _cut(rank: int, rows: ArmRows) -> StageFinding:
    """Rows that did not reach the experts."""
    total, lost = len(rows.sources) + len(rows.cut), len(rows.cut)
    first = None
    if lost:
        source_rank, source_token, slot = rows.cut[0].tolist()
        first = Divergence(
            stage=Stage.TRUNCATE,
            arm=rows.arm,
            rank=rank,
            source_rank=source_rank,
            source_token=source_token,
            row=slot,
            field="rows",
            against="received",
            rows=lost,
        )
    return StageFinding(rank=rank, arm=rows.arm, stage=Stage.TRUNCATE, rows=total, wrong=lost, first=first)


def _summed(case: Case, order: SumOrder, sums: _Sums) -> list[StageFinding]:
    """Compare each recorded token with the sum of its recorded expert rows, in its transport's order of addition."""
    rows: dict[tuple[int, str], list[bool]] = defaultdict(list)
    group = ExpertGroup(case.ep_size, case.placed_experts, case.topk_slots)
    for (arm, rank, token), combined in sums.combined.items():
        made = sums.rows.get((arm, rank, token), {})
        ids = torch.tensor([sums.ids[rank, token]])
        going = destinations(ids, group.experts_per_rank, group.ep_size)
        parts = [made.get(owner) for owner in going[0].nonzero().flatten().tolist()]
        known = [part for part in parts if part is not None]
        if len(known) == len(parts) and not order.quantised:
            returned = torch.stack(known) if known else combined.new_empty(0, case.hidden_size)
            total = added(slots_of(ids, group, order).arranged(returned), order)
            rows[rank, arm].append(not bool(same_bits_or_nan(combined.unsqueeze(0), total)))
    return [
        StageFinding(rank=rank, arm=arm, stage=SUM, rows=len(wrong), wrong=sum(wrong))
        for (rank, arm), wrong in rows.items()
    ]


def _judged(bundle: Bundle, findings: list[StageFinding], missing: list[str], *, confirmed: bool) -> Analysis:
    """Judge again, with the first divergences found in the tensors if `confirmed`, else with the recorded ones."""
    resolved, gathered = bundle.manifest.resolved, bundle.manifest.gathered
    if resolved is None or gathered is None:
        return Analysis(findings, missing, None, [])
    if confirmed and bundle.manifest.recorded.inputs == "gaussian" and gathered.gaussian is not None:
        gathered = msgspec.structs.replace(gathered, gaussian=_with_findings(gathered.gaussian, findings))
    elif confirmed:
        gathered = _with_findings(gathered, findings)
    try:
        judgement = judge(resolved, gathered)
        diagnosis = diagnose(resolved, gathered, judgement)
    except (LookupError, ValueError, TypeError, ArithmeticError) as error:
        message = f"bundle {bundle.folder}: the ranks' records contradict each other ({one_line(error)})"
        raise InvalidCase(message) from error
    return Analysis(findings, missing, judgement, diagnosis)


def _with_findings(gathered: Gathered, findings: list[StageFinding]) -> Gathered:
    """Keep the ranks' divergences that the tensors confirm, and add those that only the tensors show.

    Values that no tensor holds (row counts, num_local_tokens) are taken as recorded. A later stage of an arm that
    already went wrong is left out, as in a run: its input was wrong.
    """
    wrong = {(found.rank, found.arm, found.stage) for found in findings if found.wrong}
    records = []
    for record in gathered.observations:
        kept = [
            known
            for known in record.divergences
            if known.field not in _RECORDED_FIELDS
            or any((record.rank, known.arm, stage) in wrong for stage in _BORNE_OUT_BY[known.stage])
        ]
        records.append(msgspec.structs.replace(record, divergences=kept))
    explained = {known.arm for record in records for known in record.divergences}
    for finding in findings:
        if finding.first is not None and finding.arm not in explained:
            records[finding.rank].divergences.append(finding.first)
    return msgspec.structs.replace(gathered, observations=records)
