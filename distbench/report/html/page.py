"""The frame of every page: Jinja2 with escaping, the style sheet, and the policy that lets nothing run or load."""

from __future__ import annotations

import base64
import hashlib
from functools import lru_cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from distbench.report.html.charts import microseconds, number
from distbench.utils.text import printable

_MOST_CHARACTERS = 4000
_KEPT = "\n\t"


def render(template: str, **values: Any) -> str:
    """A whole page."""
    sheet = _style_sheet()
    return fragment(template, style=Markup(sheet), policy=_policy(sheet), **values)  # noqa: S704 - our own file


def fragment(template: str, **values: Any) -> Markup:
    """A part of a page as markup."""
    return Markup(_environment().get_template(template).render(**values))  # noqa: S704 - escaped by the template


def _policy(sheet: str) -> str:
    """Content-Security-Policy: nothing is loaded, nothing runs, and only this style sheet counts."""
    digest = base64.b64encode(hashlib.sha256(sheet.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


@lru_cache(maxsize=1)
def _style_sheet() -> str:
    return (resources.files(__package__) / "templates" / "style.css").read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader(__package__),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    made.filters |= {"n": number, "us": microseconds}
    return made


def _shown(value: Any) -> Any:
    """Text without control characters, and not longer than a reader would read; Jinja2 escapes it afterwards."""
    if type(value) is not str:  # markup is a subclass
        return value
    more = len(value) - _MOST_CHARACTERS
    kept = f"{value[:_MOST_CHARACTERS]}… ({more} characters more)" if more > 0 else value
    return kept if kept.isprintable() else "".join(one if one in _KEPT else printable(one) for one in kept)
