"""`distbench presets`: the model layers by name."""

from __future__ import annotations

import argparse
from typing import Any

from distbench.case.presets import PRESETS, ModelShape
from distbench.report.terminal import print_table


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser("presets", description="List the model layers by name.")
    command.set_defaults(command=_presets)


def _presets(_: argparse.Namespace) -> int:
    columns = ("model", "hidden", "intermediate", "experts", "top-k")
    print_table([(name, *_preset_numbers(shape)) for name, shape in PRESETS.items()], columns)
    return 0


def _preset_numbers(shape: ModelShape) -> tuple[str, ...]:
    experts = str(shape.num_experts) if shape.num_experts else f"{shape.experts_per_rank} a rank"
    return str(shape.hidden_size), str(shape.intermediate_size), experts, str(shape.topk)
