"""Records of a caller: the origin of its code, and its use on a rank. Loads no torch."""

from __future__ import annotations

import msgspec


class CallerText(msgspec.Struct, frozen=True, kw_only=True):
    """The package, its release, the wheel or folder, the files in it, and SHA-256 over the lifted text."""

    package: str
    version: str
    origin: str
    files: tuple[str, ...]
    sha256: str

    @property
    def label(self) -> str:
        """Package and release, such as sglang 0.5.23."""
        return f"{self.package} {self.version}"


class CallerUse(msgspec.Struct, frozen=True):
    """A caller on one rank: the origin of its code, the rows M that it gave to `fused_moe`, and unlike arguments.

    `differing` maps an argument of `fused_moe` to the caller's value and distbench's own, as text.
    """

    text: CallerText
    rows: int
    differing: dict[str, tuple[str, str]]
