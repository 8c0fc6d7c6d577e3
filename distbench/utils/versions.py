"""Versions of packages in PEP 440 order."""

from __future__ import annotations

from packaging.version import Version

_COMPONENTS = (2, 3, 4)
_MOST = 10**9


def release_of(text: str) -> Version | None:
    """Version such as `0.1.7.post2.dev18` or `v0.1.20`, to be compared; None for other text.

    A local version (after a plus sign), which names the build, is ignored. A single number is taken for a date or a
    commit, and any number of more than nine digits for a hash: neither is compared with releases.
    """
    try:
        version = Version(text)
    except ValueError:  # InvalidVersion, or a number with too many digits for int
        return None
    numbers = (*version.release, version.pre[1] if version.pre else 0, version.post or 0, version.dev or 0)
    if version.epoch or len(version.release) not in _COMPONENTS or max(numbers) >= _MOST:
        return None
    return Version(version.public)
