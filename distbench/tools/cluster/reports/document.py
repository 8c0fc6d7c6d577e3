"""The whole validation as JSON, equal to cluster.json."""

from __future__ import annotations

from typing import BinaryIO

from distbench.tools.cluster.validation import Validation, document


def write(validation: Validation, file: BinaryIO) -> None:
    """Write `distbench.cluster/1`."""
    file.write(document(validation))
