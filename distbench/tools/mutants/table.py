"""The tables of `distbench mutants`, for a terminal and for docs/mutants.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from distbench.faults.mutants.rules import RULES
from distbench.tools.mutants.outcomes import Found, Tried

COLUMNS = ("class", "mutants", "subtle", "exact", "gaussian", "either", *RULES)


def cells(found: Found) -> list[tuple[str, ...]]:
    """Rows for each class and for all: how many mutants each kind of inputs, and each rule, detects."""
    kinds = dict.fromkeys(one.kind for one in found.broken)
    rows = [_row(kind, [one for one in found.broken if one.kind == kind]) for kind in kinds]
    return [*rows, _row("all", found.broken)] if len(rows) > 1 else rows


def closing_lines(found: Found) -> list[str]:
    """Lines below the table, the last one being the result."""
    lines = [f"false alarm: {alarm}" for alarm in found.alarms]
    lines += [f"no result: {name}" for name in found.missing]
    lines += [f"not tried here: {name} {reason}" for name, reason in found.left_out.items()]
    lines += [f"{one.either} seen: {one.name}: {_why(one)}" for one in found.unseen]
    for rule in RULES if found.ruled else ():
        lines.append(f"{rule} rejects {len(found.rejected_by(rule))} of {found.ruled}")
    harmless, share = len(found.mutants) - len(found.broken), 100 * found.seen_share
    lines.append(
        f"{len(found.seen)} of {len(found.broken)} mutants seen in every run: {share:.1f} %, asked are "
        f"{100 * found.share:g} %; {harmless} equivalents, {len(found.alarms)} false alarms"
    )
    lines.append(f"mutants: {'passed' if found.passed else 'FAILED'}")
    return lines


def markdown(found: Found, command: str) -> str:
    """Tables of docs/mutants.md."""
    emulated = f" (emulated: {', '.join(found.stand_ins)})" if found.stand_ins else ""
    seen = (
        f"{len(found.seen)} of {len(found.broken)} mutants are seen in every run, {100 * found.seen_share:.1f} %; "
        f"{len(found.alarms)} false alarms of {len(found.mutants) - len(found.broken)} equivalents and of runs without "
        "a mutant."
    )
    blocks = [
        f"Written by `{command}` on {found.ranks} ranks, {' + '.join(found.parts)}{emulated}, {found.seeds} seeds.",
        _table(COLUMNS, cells(found)),
        seen,
        "### Not seen in every run",
        _table(("mutant", "seen", "not in", "why"), [_missed(one) for one in found.unseen])
        if found.unseen
        else "None.",
        "### All mutants",
        _table(("mutant", "class", "seam", "what it does", "stands for", "exact", "gaussian", *RULES), _listed(found)),
        "### Equivalents",
        _table(
            ("mutant", "class", "what it does", "why it must not alarm"),
            [(one.name, one.kind, one.text, one.equivalent) for one in found.mutants if one.equivalent],
        ),
    ]
    return "\n\n".join(blocks) + "\n"


def rules_table() -> str:
    """The public rules with their sources, as markdown."""
    rows = [(name, rule.project, rule.source, rule.text) for name, rule in RULES.items()]
    return _table(("rule", "project", "file and version", "accepts"), rows)


def _row(kind: str, mutants: Sequence[Tried]) -> tuple[str, ...]:
    counts = [Counter(getattr(one, column) for one in mutants) for column in ("exact", "gaussian", "either")]
    often = [" / ".join(str(count[word]) for word in ("always", "sometimes", "never")) for count in counts]
    rules = [str(sum(one.rules.get(rule, False) for one in mutants)) for rule in RULES]
    return (kind, str(len(mutants)), str(sum(one.subtle for one in mutants)), *often, *rules)


def _missed(one: Tried) -> tuple[str, ...]:
    return one.name, one.either, "; ".join(one.missed), _why(one)


def _why(one: Tried) -> str:
    return one.unseen or f"not explained; it ended in {', '.join(one.verdicts)}"


def _listed(found: Found) -> Iterator[tuple[str, ...]]:
    for one in found.broken:
        rules = ["" if rule not in one.rules else "rejects" if one.rules[rule] else "accepts" for rule in RULES]
        name = f"{one.name} (subtle)" if one.subtle else one.name
        yield name, one.kind, one.seam, one.text, one.bug, one.exact, one.gaussian, *rules


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
