"""Secrets in a report, replaced before it is sent. Loads no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from distbench.case.sglang_env import is_secret

MASK = "[masked]"

_LEAST_CHARACTERS = 6
"""Values of this process's secret variables that are shorter are too common in other text to be replaced."""

_ASSIGNED = re.compile(
    r"\b([A-Za-z_][\w-]*)([\"']?\s*[=:]\s*)(\"[^\"]*\"|'[^']*'|(?:Basic\s+)?[^\s,;&\"']{6,})"  # also in JSON
)
_FORMATS = (
    re.compile(r"(?<=://)[^/@\s]+(?=@)"),  # user:password of a URL
    re.compile(r"(?<=\bBearer )\S+", re.IGNORECASE),
    re.compile(r"\b(?:gh[pousr]_|github_pat_|glpat-|hf_|xox[abprs]-)[\w-]{16,255}"),
    re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    re.compile(r"\beyJ[\w-]{8,1000}\.[\w-]{1,4000}\.[\w-]{1,1000}"),  # a JSON web token
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL),
)


class Masking:
    """Replaces secrets by MASK, and counts them.

    A secret is the value of a name that marks it as one (`is_secret`), as a key or as `NAME=value` in a text; text in
    the format of a known kind of token, key, or password in a URL; and the value that a variable of such a name has in
    `environ`, wherever it stands.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        """Take the secrets of `environ`, the longest first, since one may be part of another."""
        values = {value for name, value in environ.items() if is_secret(name) and len(value) >= _LEAST_CHARACTERS}
        self._known = sorted(values, key=len, reverse=True)
        self.count = 0

    def document(self, value: Any, name: str = "") -> Any:
        """The same JSON document without its secrets; `name` is the key that holds it."""
        if isinstance(value, str):
            return self._replaced() if value and is_secret(name) else self.text(value)
        if isinstance(value, dict):
            return {self.text(key): self.document(one, key) for key, one in value.items()}
        if isinstance(value, list):
            return [self.document(one, name) for one in value]
        return value

    def text(self, text: str) -> str:
        """The same text without its secrets."""
        for known in self._known:
            if known in text:
                self.count += text.count(known)
                text = text.replace(known, MASK)
        for kind in _FORMATS:
            text = kind.sub(self._replaced, text)
        return _ASSIGNED.sub(self._assigned, text)

    def _assigned(self, found: re.Match[str]) -> str:
        name, sign, value = found.groups()
        return (
            f"{name}{sign}{self._replaced()}"
            if is_secret(name.replace("-", "_")) and value.strip("\"'") != MASK
            else found[0]
        )

    def _replaced(self, *_: Any) -> str:
        self.count += 1
        return MASK
