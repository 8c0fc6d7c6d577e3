"""Versions of packages in PEP 440 order."""

from __future__ import annotations

import math
import re

_VERSION = re.compile(
    r"v?(?P<release>\d{1,9}(?:\.\d{1,9}){1,3})"
    r"(?:[-_.]?(?:a|b|rc)(?P<pre>\d{1,9}))?"
    r"(?:[-_.]?post(?P<post>\d{1,9}))?"
    r"(?:[-_.]?dev(?P<dev>\d{1,9}))?"
    r"(?:\+[0-9A-Za-z.]*)?",
    re.ASCII,
)

VersionKey = tuple[tuple[int, ...], float, float, float]


def version_key(text: str) -> VersionKey | None:
    """Sort key of a version such as `0.1.7.post2.dev18` or `v0.1.20`; None for other text.

    A local version (after a plus sign), which names the build, is ignored.
    """
    match = _VERSION.fullmatch(text.strip())
    if match is None:
        return None
    release = tuple(int(part) for part in match["release"].split("."))
    post = -1.0 if match["post"] is None else float(match["post"])
    dev = math.inf if match["dev"] is None else float(match["dev"])
    before_release = math.inf if match["dev"] is None or post >= 0 else -1.0
    pre = before_release if match["pre"] is None else float(match["pre"])
    return release + (0,) * (4 - len(release)), pre, post, dev
