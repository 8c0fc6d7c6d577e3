"""The rules of plugins and of conformance in the docs are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from distbench.case.contract import RULES
from distbench.testing import conformance

DOCS = Path(__file__).parents[3] / "docs"


@pytest.mark.parametrize(("page", "rules"), [("plugins.md", RULES), ("conformance.md", conformance.RULES)])
def test_page_has_every_rule_with_its_text(page: str, rules: dict[str, str]) -> None:
    rows = dict(re.findall(r"^\| `([\w.-]+)` \| (.*) \|$", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE))
    listed = {
        name: text.partition(";")[0] if name == "overflow" else text for name, text in rows.items() if name in rules
    }
    assert listed == rules
