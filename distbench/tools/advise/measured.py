"""Times of the limits that an advice lists, measured by running the layer at each of them on this machine."""

from __future__ import annotations

import msgspec

from distbench.case.spec import Case
from distbench.case.trace_name import trace_name
from distbench.errors import Unsupported
from distbench.report.schema import parts_label
from distbench.report.sweep import sweep_row
from distbench.tools.advise.advice import Advice
from distbench.tools.lab import Lab, varied
from distbench.utils.text import counted
from distbench.workload.trace_file import read_header, read_slice


def measured(advice: Advice, asked: Case, lab: Lab) -> Advice:
    """The advice with the times of the `asked` layer at each candidate and without a limit, in one launch.

    The batch has the most tokens of each rank, or those of the fullest recorded step. A limit below the rows that some
    rank receives of it has no time.

    Raises:
        Interrupted: by SIGINT or SIGTERM.
        InvalidCase: the layer cannot run with these options.
        Unsupported: this machine lacks what it needs; or no limit has a time.

    """
    case = _batch(advice, asked)
    listed = [*advice.candidates, advice.whole_buffer]
    limits = [*(str(one.limit) for one in advice.candidates), "off"]
    reports = lab.run([varied(case, limit=limit) for limit in limits])
    timed = next((report for report in reports if report.method), None)
    if timed is None:
        endings = ", ".join(dict.fromkeys(report.verdict.value for report in reports))
        message = f"--measure: no limit has a time, the runs ended {endings}; distbench run shows why"
        raise Unsupported(message)
    rows = [sweep_row(report) for report in reports]
    told = [
        msgspec.structs.replace(one, layer_us=row.layer_us, experts_us=row.experts_us, verdict=row.verdict)
        for one, row in zip(listed, rows, strict=True)
    ]
    parts = parts_label(timed.plugins, timed.stand_ins)
    batch = f"{counted(sum(case.tokens), 'token')} by {case.routing}"
    about = f"layer us: measured for {batch}, median of the slowest rank{parts}; clock: {timed.method['clock']}"
    return msgspec.structs.replace(advice, candidates=told[:-1], whole_buffer=told[-1], measured=about)


def _batch(advice: Advice, asked: Case) -> Case:
    named = trace_name(asked.routing)
    if named is None:
        return msgspec.structs.replace(asked, tokens=tuple(advice.most_tokens))
    header = read_header(named.path)
    step, layer = (advice.seen.step, advice.seen.layer) if advice.recorded else (named.step, named.layer)
    if step is None or layer is None:
        step = next(iter(header.steps))
        layer = header.steps[step][0]
    tokens = tuple(read_slice(header, step, layer).tokens.tolist())
    return msgspec.structs.replace(asked, tokens=tokens, routing=str(named._replace(step=step, layer=layer)))
