"""Versions of packages, ordered as PEP 440 orders them."""

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
    """Return what versions are compared by, such as those of `0.1.7.post2.dev18` and `v0.1.20`; None if it is none.

    What follows a plus sign, which says where it was built, does not count.
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
