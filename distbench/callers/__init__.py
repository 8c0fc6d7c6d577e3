"""Production's own code between dispatch and combine, lifted from a package's text (docs/callers.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distbench.case.plugins import is_built_in, load_plugin

if TYPE_CHECKING:
    from distbench.callers.base import Caller
    from distbench.callers.setting import Setting
    from distbench.case.spec import Case
    from distbench.experts.aiter.adapter import AiterExperts


def make_caller(setting: Setting, experts: AiterExperts) -> Caller:
    """Return the case's caller: of the wheel or the folder that it names, of the installed package, or of a plugin.

    Raises:
        InvalidCase: the wheel is none of the package, or the case follows the rules of another release.
        Unsupported: the package is not installed, its release lacks a definition that is lifted, or a plugin does not
            state what the case needs.
        BrokenContract: a plugin's factory raises, or returns no caller.
    """
    from distbench.callers.base import CallerContext  # noqa: PLC0415 - loads torch

    name = setting.case.caller
    plugin, context = load_plugin("caller", name), CallerContext(setting, experts)
    if is_built_in("caller", name):
        made: Caller = plugin.make(context)
        return made
    from distbench.callers.contract import made_caller  # noqa: PLC0415 - only for plugins
    from distbench.case.contract import check_stated  # noqa: PLC0415 - only for plugins

    check_stated(plugin, "caller", setting.case, setting.device.type)
    return made_caller(plugin, context)


def check_caller(case: Case) -> None:
    """Check that the caller's text is there and has the definitions that would be lifted, without executing any.

    A plugin is left to the ranks.

    Raises:
        InvalidCase, Unsupported: as `make_caller`.
    """
    if not is_built_in("caller", case.caller):
        return
    from distbench.callers.atom import definitions as atom  # noqa: PLC0415 - not loaded without a caller
    from distbench.callers.lift import check_definitions  # noqa: PLC0415
    from distbench.callers.packages import package_text  # noqa: PLC0415
    from distbench.callers.sglang import definitions as sglang  # noqa: PLC0415
    from distbench.callers.vllm import definitions as vllm  # noqa: PLC0415

    known = {"sglang": sglang.DEFINITIONS, "vllm": vllm.DEFINITIONS, "atom": atom.DEFINITIONS}
    check_definitions(package_text(case), known[case.caller])
