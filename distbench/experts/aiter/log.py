"""aiter's log line of a kernel choice, the only record from the moment of the choice."""

from __future__ import annotations

import logging
import re
from functools import lru_cache

from distbench.experts.selection.choice import KernelChoice
from distbench.experts.selection.heuristics import LayerKey
from distbench.experts.selection.tuned_table import MISSING

_LINE = re.compile(r"\[fused_moe\] using (?P<stages>[12])stage\b(?P<kernels>.*?) for \((?P<key>.*)\)")
_NAME = re.compile(r"kernelName([12])='([^']*)'")
_QUOTED = re.compile(r"'[^']*'")
_NUMBER = re.compile(r"(?<![\w.])[0-9]+(?![\w.])")


class KernelLog(logging.Handler):
    """All such lines of this process: aiter logs each choice once only."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._lines: dict[str, re.Match[str]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the line of a kernel choice."""
        match = _LINE.search(" ".join(record.getMessage().split()))
        if match:
            self._lines[match[0]] = match

    def of_layer(self, layer: LayerKey) -> list[str]:
        """Return the lines about `layer`."""
        wanted = [layer.cu_count, layer.model_dim, layer.inter_dim, layer.num_local_experts]
        found = [(line, _numbers(match)) for line, match in self._lines.items()]
        return [line for line, (cu_count, _, *shape) in found if [cu_count, *shape] == wanted]

    def doubt(self, choice: KernelChoice, layer: LayerKey) -> str:
        """Return why `choice` may not name the kernels that ran: the log names others for its bucket; else None."""
        lines = [line for line in self.of_layer(layer) if _numbers(self._lines[line])[1] == choice.bucket]
        if not lines or any(_agrees(self._lines[line], choice) for line in lines):
            return ""
        return f"aiter logged {lines[-1]!r:.300}, but selects {choice.label} ({choice.stage1!r}): trust the line"


@lru_cache(maxsize=1)
def kernel_log() -> KernelLog:
    """Return the single log of this process, and start listening."""
    log, logger = KernelLog(), logging.getLogger("aiter")
    logger.addHandler(log)
    if not logger.isEnabledFor(logging.INFO):
        logger.setLevel(logging.INFO)
    return log


def _numbers(match: re.Match[str]) -> list[int]:
    """Return compute units, bucket, model_dim, inter_dim, local experts; an architecture's name may come first."""
    return [int(number) for number in _NUMBER.findall(_QUOTED.sub("", match["key"]))][:5]


def _agrees(match: re.Match[str], choice: KernelChoice) -> bool:
    """Compare kernel names; for one stage only the first, since the second repeats the table's cell unread."""
    stages = "1" if choice.run_1stage else "12"
    logged = {stage: name for stage, name in _NAME.findall(match["kernels"]) if stage in stages and name not in MISSING}
    expected = dict(zip(stages, (choice.stage1, choice.stage2), strict=False)) if choice.source == "tuned" else {}
    return (match["stages"] == "1") == choice.run_1stage and logged == expected
