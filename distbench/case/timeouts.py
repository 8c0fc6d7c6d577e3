"""Time limits of stages: a rank that stays in one stage longer counts as hung."""

from __future__ import annotations

from distbench.case.spec import Case
from distbench.case.stages import LAYER_STAGES, STAGES, Stage
from distbench.errors import InvalidCase

# Work per second of the slowest machine worth supporting; the time of more work is added to the case's own limit.
_FLOPS_PER_S = 1e9
_BYTES_PER_S = 50e6
_COMPILE_SECONDS = 3600.0
# Seconds of a case without tokens, added to these rates.
_FIXED_SECONDS = 0.1
_MAX_SECONDS = 86400.0


def parse_stage_timeouts(text: str) -> dict[str, float]:
    """Parse `stage=seconds,…`.

    Raises:
        InvalidCase: an unknown stage, or an invalid number of seconds.

    """
    limits = {}
    for part in filter(None, (one.strip() for one in text.split(","))):
        stage, _, number = (one.strip() for one in part.partition("="))
        seconds = _seconds(number)
        if stage not in STAGES or not 0 < seconds <= _MAX_SECONDS:
            message = (
                f"stage_timeouts = {part!r:.80}: allowed is stage=seconds, stage one of {', '.join(STAGES)}, "
                f"seconds above 0 and up to {_MAX_SECONDS:g}"
            )
            raise InvalidCase(message)
        limits[stage] = seconds
    return limits


def compiles(case: Case) -> bool:
    """Whether ranks of `case` may compile before they first dispatch: packages and plugins do, stand-ins do not."""
    packages = case.experts == "aiter" or case.transport == "mori"
    kernels = case.experts == "triton" or case.transport == "symmetric"
    return kernels or bool(case.plugins) or (packages and not case.emulate)


def stage_limit(case: Case, stage: str) -> float:
    """Seconds that `stage` of `case` may take: the limit given for the stage, else for all, plus time for its size.

    The size is the worst case: all tokens of all ranks on one rank.
    """
    given = parse_stage_timeouts(case.stage_timeouts)
    allowed = given[stage] if stage in given else case.timeout + _work_seconds(case, stage)
    return allowed + case.jitter / 1000


def patience(case: Case, stage: str) -> float:
    """Seconds that a rank may wait for another one in `stage`: the limit given for the stage, else the longest of any.

    A rank that it waits for may still be in an earlier stage, with that stage's limit.
    """
    layer = (stage,) if stage in parse_stage_timeouts(case.stage_timeouts) else (*LAYER_STAGES, Stage.CHECK)
    return max(stage_limit(case, one) for one in layer)


def case_work(case: Case) -> float:
    """Work of a whole case, to compare cases on one machine: in seconds of a far slower machine."""
    arm = sum(
        _work_seconds(case, stage)
        for stage in (Stage.DISPATCH, Stage.EXPERTS, Stage.COMBINE, Stage.CHECK, Stage.GATHER)
    )
    runs = case.repeats + case.iterations + (case.warmup if case.iterations else 0)
    return _FIXED_SECONDS + _work_seconds(case, Stage.WORKLOAD) + arm * runs


def _work_seconds(case: Case, stage: str) -> float:
    tokens = sum(case.tokens)
    row = case.hidden_size * 2
    expert = 3 * case.hidden_size * case.intermediate_size
    if stage == Stage.TIMING:
        return sum(_work_seconds(case, part) for part in (Stage.DISPATCH, Stage.EXPERTS, Stage.COMBINE))
    if stage == Stage.EXPERTS:
        return 2 * tokens * case.topk_slots * expert / _FLOPS_PER_S
    if stage == Stage.WORKLOAD:
        return (case.experts_per_rank * expert * 2 + case.capacity * row) / _BYTES_PER_S
    if stage == Stage.COMPILE:
        return _COMPILE_SECONDS
    if stage in (Stage.DISPATCH, Stage.COMBINE, Stage.CHECK, Stage.GATHER):
        return tokens * case.topk_slots * row / _BYTES_PER_S
    return 0.0


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")
