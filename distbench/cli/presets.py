"""`distbench presets`: the model layers by name."""

from __future__ import annotations

import argparse
from typing import Any

from distbench.case.presets import ALIASES, PRESETS, ModelShape
from distbench.report.terminal import print_table, print_text


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser("presets", description="List the model layers by name.")
    command.set_defaults(command=_presets)


def _presets(_: argparse.Namespace) -> int:
    columns = ("model", "layers", "hidden", "intermediate", "experts", "shared", "top-k", "source", "published")
    print_table([(name, *_cells(shape)) for name, shape in PRESETS.items()], columns)
    aliases: dict[str, list[str]] = {}
    for alias, name in ALIASES.items():
        aliases.setdefault(name, []).append(alias)
    for name, others in aliases.items():
        print_text(f"{name}: also {', '.join(others)}")
    print_text("A model's own file does as well: --model path/to/config.json, or the folder that has it.")
    return 0


def _cells(shape: ModelShape) -> tuple[str, ...]:
    experts = str(shape.num_experts) if shape.num_experts else f"{shape.experts_per_rank} a rank"
    numbers = (shape.layers, shape.hidden_size, shape.intermediate_size, experts, shape.shared_experts, shape.topk)
    return (*map(str, numbers), shape.source or "made for tests", shape.published)
