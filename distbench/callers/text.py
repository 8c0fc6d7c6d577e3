"""Origin of a caller's code. Loads no torch."""

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
