"""A validation as a page: the node or link at fault, and a map of all nodes and links."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import BinaryIO, NamedTuple

from markupsafe import Markup

from distbench.report.html import charts
from distbench.report.html.case_page import GLYPHS
from distbench.report.html.cells import cell_paths
from distbench.report.html.page import render
from distbench.tools.cluster.attribution import ClusterFinding, GroupRun
from distbench.tools.cluster.plan import Group, Step
from distbench.tools.cluster.stragglers import relative_times
from distbench.tools.cluster.validation import Validation

MOST_NUMBERED = 24
"""Most nodes whose map is a table with a sign for each link."""
MOST_MAPPED = 256
"""Most nodes that have a map; of more, the lists tell."""

_SHOWN_GROUPS, _SHOWN_NODES = 200, 1024
_AT_FAULT = ("node", "link")
_SLOW = ("slow node", "slow link")
_SIGNS = {verdict.value: glyph for verdict, glyph in GLYPHS.items()}
_STEPS: Mapping[Step, str] = {"nodes": "alone", "pairs": "in pairs"}


class Mark(NamedTuple):
    """A node alone or a link on the map: colour, sign, whether it is named as at fault, and that in words."""

    kind: str
    sign: str
    named: bool
    words: str


class NodeRow(NamedTuple):
    """A node in the table: its number on the map, and its results in words."""

    number: int
    name: str
    mark: Mark
    alone: str
    pairs: str
    devices: str


class ClusterPage(NamedTuple):
    """Content of the page of a validation; `marks` has the map with signs, `paths` the one without, by kind."""

    kind: str
    glyph: str
    heading: str
    headline: str
    emulated: bool
    findings: Sequence[ClusterFinding]
    gaps: list[str]
    marks: list[list[Mark]]
    paths: Mapping[str, Markup]
    nodes: list[NodeRow]
    more_nodes: int
    times: charts.Rows | None
    failed: list[GroupRun]
    more_failed: int
    groups: list[GroupRun]
    more_groups: int


def write(validation: Validation, file: BinaryIO) -> None:
    """Write the page; a lone surrogate, which UTF-8 cannot hold, becomes `?`."""
    page = cluster_page(validation)
    title = f"cluster {validation.suite}: {page.heading}"
    file.write(render("cluster.html", title=title, page=page).encode("utf-8", "replace"))


def cluster_page(validation: Validation) -> ClusterPage:
    """The page of a validation."""
    failed = [trial for trial in validation.trials if trial.failed]
    passed = len(validation.trials) - len(failed)
    found = _Map(validation)
    nodes = validation.nodes
    rows = found.rows() if len(nodes) <= MOST_MAPPED else []
    small = len(nodes) <= MOST_NUMBERED
    good = validation.exit_code == 0
    return ClusterPage(
        kind="good" if good else "bad",
        glyph="✓" if good else "✗",
        heading=_heading(validation),
        headline=f"{passed} of {len(validation.trials)} groups of {len(nodes)} nodes pass {validation.suite}; "
        f"exit code {validation.exit_code}",
        emulated=validation.emulated,
        findings=validation.findings,
        gaps=[
            *(f"{step}: not run, too few nodes are left or all share a fault" for step in validation.not_run),
            *(f"not judged: {gap}" for gap in validation.not_judged),
        ],
        marks=rows if small else [],
        paths={} if small else cell_paths([[mark.kind for mark in row] for row in rows]),
        nodes=[found.row(number, node) for number, node in enumerate(nodes[:_SHOWN_NODES], 1)],
        more_nodes=max(len(nodes) - _SHOWN_NODES, 0),
        times=_times(validation),
        failed=failed[:_SHOWN_GROUPS],
        more_failed=max(len(failed) - _SHOWN_GROUPS, 0),
        groups=validation.trials[:_SHOWN_GROUPS],
        more_groups=max(len(validation.trials) - _SHOWN_GROUPS, 0),
    )


def _heading(validation: Validation) -> str:
    """Findings in words, by kind."""
    kinds = Counter(kind for kind, _ in dict.fromkeys((found.kind, found.nodes) for found in validation.findings))
    told = [
        {
            "common": "all nodes share a fault",
            "fabric": "every pair fails",
            "scale": "only all nodes together fail",
        }.get(kind, f"{count} {kind}{'' if count == 1 else 's'}{' at fault' if kind in _AT_FAULT else ''}")
        for kind, count in kinds.items()
    ]
    if told:
        return ", ".join(told)
    return "No node or link at fault" if validation.exit_code == 0 else "Groups fail, and no node or link is to blame"


class _Map:
    """Marks of nodes and links from the trials and the findings."""

    def __init__(self, validation: Validation) -> None:
        self._nodes = validation.nodes
        self._trials = {frozenset(trial.nodes): trial for trial in validation.trials if trial.step != "all"}
        named = [found for found in validation.findings if found.kind in (*_AT_FAULT, *_SLOW)]
        self._named: dict[frozenset[str], str] = {}
        for found in named:
            self._named.setdefault(frozenset(found.nodes), found.kind)

    def rows(self) -> list[list[Mark]]:
        """The map: nodes alone on the diagonal, links off it."""
        return [[self.mark((first, second)) for second in self._nodes] for first in self._nodes]

    def mark(self, ends: Group) -> Mark:
        """The mark of a link, or of a node as both ends."""
        group = frozenset(ends)
        trial, kind = self._trials.get(group), self._named.get(group, "")
        name = " and ".join(dict.fromkeys(ends))
        told = f"{name}: {'not run' if trial is None else trial.verdict}{f', {kind}' if kind else ''}"
        at_fault = kind in _AT_FAULT
        if trial is not None and trial.failed:
            return Mark("bad", _SIGNS.get(trial.verdict, "✗") + "!" * at_fault, at_fault, told)
        if at_fault:
            return Mark("bad", "!", at_fault, told)
        if kind:
            return Mark("expected", "~", named=True, words=told)
        return (
            Mark("none", "·", named=False, words=told) if trial is None else Mark("good", "✓", named=False, words=told)
        )

    def row(self, number: int, node: str) -> NodeRow:
        """The row of a node in the table."""
        alone = self._trials.get(frozenset((node,)))
        pairs = [trial for trial in self._partners(node) if trial is not None]
        passed = sum(not trial.failed for trial in pairs)
        return NodeRow(
            number=number,
            name=node,
            mark=self.mark((node,)),
            alone="not run" if alone is None else f"{alone.verdict}, {alone.wall_s:.1f} s",
            pairs=f"{passed} of {len(pairs)}" if pairs else "not run",
            devices="" if alone is None else ", ".join(alone.devices),
        )

    def _partners(self, node: str) -> Iterator[GroupRun | None]:
        return (self._trials.get(frozenset((node, other))) for other in self._nodes if other != node)


def _times(validation: Validation) -> charts.Rows | None:
    """Times of groups by stage as multiples of their median; None where they could not be judged."""
    stages = dict.fromkeys(stage for trial in validation.trials for stage in trial.times)
    slow = {frozenset(found.nodes) for found in validation.findings if found.kind in _SLOW}
    series = []
    for step, how in _STEPS.items():
        for stage in stages:
            found = relative_times(validation.trials, step, stage)
            if found:
                slowest = max(found, key=found.__getitem__)
                label = f"{stage}, {how}: up to {found[slowest]:.2f}, {' and '.join(slowest)}"
                named = bool(slow & {frozenset(slowest), *(frozenset((node,)) for node in slowest)})
                series.append(charts.Series(label, list(found.values()), alarm=named))
    return charts.rows_over_ratio(series, "median") if series else None
