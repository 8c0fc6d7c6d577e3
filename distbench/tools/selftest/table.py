"""The table of a self-test, for a terminal and for docs/selftest.md."""

from __future__ import annotations

from distbench.tools.selftest.outcomes import Outcomes
from distbench.utils.text import counted

COLUMNS = ("fault", "expected", "verdict", "diagnosis", "caught", "right", "healthy rank blamed")


def ran(outcomes: Outcomes) -> str:
    """Transport and experts that ran: a self-test makes a statement about these only."""
    emulated = f" (emulated: {', '.join(outcomes.stand_ins)})" if outcomes.stand_ins else ""
    return f"{counted(outcomes.ranks, 'rank')}, {' + '.join(outcomes.parts)}{emulated}"


def cells(outcomes: Outcomes) -> list[tuple[str, ...]]:
    """Rows of the table."""
    return [
        (
            row.label,
            row.expected,
            row.verdicts,
            row.diagnosis,
            f"{row.caught}/{row.seeds}",
            f"{row.right}/{row.seeds}",
            str(row.healthy_blamed),
        )
        for row in outcomes.rows
    ]


def closing_lines(outcomes: Outcomes) -> list[str]:
    """Lines below the table, the last one being the result."""
    seeds = sum(row.seeds for row in outcomes.rows)
    caught, right = sum(row.caught for row in outcomes.rows), sum(row.right for row in outcomes.rows)
    blamed, alarms = sum(row.healthy_blamed for row in outcomes.rows), outcomes.false_alarms
    missing = [f"{counted(outcomes.missing, 'case')} left no result"] if outcomes.missing else []
    total = (
        f"{counted(len(outcomes.rows), 'fault')}, {counted(seeds, 'case')}: {caught} caught, {right} with the right "
        f"verdict, first stage and ranks ({100 * outcomes.right_share:.1f} %), a healthy rank blamed in {blamed}; "
        f"{counted(len(alarms), 'false alarm')} in {counted(outcomes.clean, 'clean case')}"
    )
    not_tried = [f"not tried here: {label}: {reason}" for label, reason in outcomes.not_tried.items()]
    result = f"selftest: {'passed' if outcomes.passed else 'FAILED'}"
    return [*(f"false alarm: {alarm}" for alarm in alarms), *missing, *not_tried, total, result]


def markdown(outcomes: Outcomes, command: str) -> str:
    """Content of docs/selftest.md."""
    head = [
        "# Self-test",
        "",
        f"Written by `{command}`.",
        f"Ran on {ran(outcomes)}.",
        "",
        "Each case has a fault on a random rank, in a random arm; `right` is the right verdict, first stage and ranks",
        "together. With `numerics=gaussian` a fault has gaussian inputs alone, where no exact bit gives it away.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    table = ["| " + " | ".join(row) + " |" for row in cells(outcomes)]
    bugs = [f"| {row.label} | {row.bug} |" for row in outcomes.rows]
    closing = [part for line in closing_lines(outcomes) for part in (line, "")]
    return "\n".join([*head, *table, "", *closing, "| fault | stands for |", "|---|---|", *bugs, ""])
