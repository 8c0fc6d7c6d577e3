"""A plugin's caller as it is made: what breaks the contract is named, by the rule."""

from __future__ import annotations

import re
from typing import Any

from distbench.callers.base import Caller, CallerContext
from distbench.callers.text import CallerText
from distbench.case.plugins import Plugin
from distbench.errors import BrokenContract, DistbenchError
from distbench.utils.text import one_line

_SHA256 = re.compile(r"[0-9a-f]{64}")


def made_caller(plugin: Plugin, context: CallerContext) -> Caller:
    """Return the caller of a plugin.

    Raises:
        BrokenContract: `make` raises, returns anything else, or a caller without a text of its own.
    """
    name = context.setting.case.caller
    try:
        made: Any = plugin.make(context)
    except DistbenchError:
        raise
    except Exception as error:
        message = f"caller {name} breaks caller.made: it raised {type(error).__name__}: {one_line(error)}"
        raise BrokenContract(message) from error
    text = getattr(made, "text", None)
    if not isinstance(made, Caller):
        message = f"caller {name} breaks caller.made: make returned a {type(made).__name__}"
        raise BrokenContract(message)
    if not isinstance(text, CallerText) or not _SHA256.fullmatch(text.sha256):
        message = f"caller {name} breaks caller.text: text is no CallerText with a sha256 of 64 small hex digits"
        raise BrokenContract(message)
    return made
