"""Production's own code between dispatch and combine, lifted from a package's text (docs/callers.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distbench.errors import InvalidCase

if TYPE_CHECKING:
    from distbench.callers.base import Caller
    from distbench.callers.setting import Setting
    from distbench.case.spec import Case
    from distbench.experts.aiter.adapter import AiterExperts


def make_caller(setting: Setting, experts: AiterExperts) -> Caller:
    """Return the case's caller: of the wheel or the folder that it names, or of the installed package.

    Raises:
        InvalidCase: the wheel is none of the package, or the case follows the rules of another release.
        Unsupported: the package is not installed, or its release lacks a definition that is lifted.
    """
    from distbench.callers.packages import package_text  # noqa: PLC0415 - a rank loads only what it uses

    case, text = setting.case, package_text(setting.case)
    if case.caller == "vllm":
        from distbench.callers.vllm.caller import VllmCaller  # noqa: PLC0415

        return VllmCaller(text, setting, experts)
    if case.caller == "atom":
        from distbench.callers.atom.caller import AtomCaller  # noqa: PLC0415

        return AtomCaller(text, setting, experts)
    from distbench.callers.sglang.caller import SglangCaller  # noqa: PLC0415

    if case.sglang_version not in ("", text.version):
        message = (
            f"sglang_version = {case.sglang_version}: the caller is {text.label}; give that version, or drop the key"
        )
        raise InvalidCase(message)
    return SglangCaller(text, setting, experts)


def check_caller(case: Case) -> None:
    """Check that the caller's text is there and has the definitions that would be lifted, without executing any.

    Raises:
        InvalidCase, Unsupported: as `make_caller`.
    """
    from distbench.callers.atom import definitions as atom  # noqa: PLC0415 - not loaded without a caller
    from distbench.callers.lift import check_definitions  # noqa: PLC0415
    from distbench.callers.packages import package_text  # noqa: PLC0415
    from distbench.callers.sglang import definitions as sglang  # noqa: PLC0415
    from distbench.callers.vllm import definitions as vllm  # noqa: PLC0415

    known = {"sglang": sglang.DEFINITIONS, "vllm": vllm.DEFINITIONS, "atom": atom.DEFINITIONS}
    check_definitions(package_text(case), known[case.caller])
