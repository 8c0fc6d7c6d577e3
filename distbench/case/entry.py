"""A case as it runs: its name, its expected verdict and where its values came from."""

from __future__ import annotations

import msgspec

from distbench.case.expectations import BY_LIMIT
from distbench.case.spec import Case


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One case of a launch: its name there, the source of each of its values, and the expected verdict.

    `suite` names the suite that the case belongs to, or the command that made it, such as `distbench run`. `expect` is
    the expected ending (see `distbench.case.expectations`). `refused` is the reason why the case ends in `expect`
    before a rank has seen it; empty for all others.
    """

    name: str
    case: Case
    sources: dict[str, str]
    suite: str = ""
    tags: tuple[str, ...] = ()
    expect: str = BY_LIMIT
    warnings: tuple[str, ...] = ()
    refused: str = ""
