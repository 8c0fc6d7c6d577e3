"""A plugin's caller as it is made: what breaks the contract is named, by the rule."""

from __future__ import annotations

import re
from typing import Any

from distbench.callers.base import Caller, CallerContext
from distbench.callers.text import CallerText
from distbench.case.contract import Contract
from distbench.case.plugins import Plugin

_SHA256 = re.compile(r"[0-9a-f]{64}")


def made_caller(plugin: Plugin, context: CallerContext) -> Caller:
    """Return the caller of a plugin.

    Raises:
        BrokenContract: `make` raises, returns anything else, or a caller without a text of its own.
    """
    contract = Contract("caller", context.setting.case.caller)
    made: Any = contract.call("caller.made", plugin.make, context)
    text = getattr(made, "text", None)
    if not isinstance(made, Caller):
        contract.refuse("caller.made", f"make returned a {type(made).__name__}")
    if not isinstance(text, CallerText) or not _SHA256.fullmatch(text.sha256):
        contract.refuse("caller.text", "text is no CallerText with a sha256 of 64 small hex digits")
    return made
