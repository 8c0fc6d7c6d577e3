"""Production's own code between dispatch and combine, lifted from a package's text (docs/callers.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distbench.errors import InvalidCase

if TYPE_CHECKING:
    from distbench.callers.base import Caller
    from distbench.callers.setting import Setting
    from distbench.experts.aiter.adapter import AiterExperts


def make_caller(name: str, wheel: str, setting: Setting, experts: AiterExperts) -> Caller:
    """Return the caller `name`: of the wheel at the path `wheel`, or of the installed package if it is empty.

    Raises:
        InvalidCase: `wheel` is no wheel of the package, or the case follows the rules of another release.
        Unsupported: the package is not installed, or its release lacks a definition that is lifted.
    """
    from distbench.callers.packages import package_text  # noqa: PLC0415 - a rank loads only what it uses
    from distbench.callers.sglang.caller import SglangCaller  # noqa: PLC0415

    text = package_text(name, wheel)
    asked = setting.case.sglang_version
    if asked not in ("", text.version):
        message = f"sglang_version = {asked}: the caller is {text.label}; give that version, or drop the key"
        raise InvalidCase(message)
    return SglangCaller(text, setting, experts)
