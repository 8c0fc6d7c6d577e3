"""A page of HTML with pictures, for people."""

from __future__ import annotations

from typing import BinaryIO

from distbench.report.html.results_page import page_of
from distbench.report.results import Results


def write(results: Results, file: BinaryIO) -> None:
    """Write the page; a lone surrogate, which UTF-8 cannot hold, becomes `?`."""
    file.write(page_of(results).encode("utf-8", "replace"))
