"""Pages of HTML in tests: proof that nothing in them runs or loads, their words, and hostile reports."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from lxml import html

from tests.results import limit, result

HOSTILE = (
    "\"'><script>alert(1)</script><svg onload=x><img src=http://x.test/ onerror=x>javascript:x {{ 7*7 }} \x1b[31m\u202e"
)
TAGS = {
    "html",
    "head",
    "meta",
    "title",
    "style",
    "body",
    "main",
    "footer",
    "header",
    "section",
    "article",
    "div",
    "p",
    "ul",
    "ol",
    "li",
    "h1",
    "h2",
    "h3",
    "small",
    "strong",
    "span",
    "code",
    "a",
    "figure",
    "figcaption",
    "table",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "svg",
    "path",
    "text",
    "details",
    "summary",
    "dl",
    "dt",
    "dd",
    "em",
    "pre",
}
ATTRIBUTES = {
    "lang",
    "charset",
    "http-equiv",
    "content",
    "name",
    "class",
    "aria-hidden",
    "aria-label",
    "tabindex",
    "role",
    "scope",
    "viewbox",
    "d",
    "x",
    "y",
    "id",
    "href",
    "title",
}
KEPT = {"schema", "verdict", "confidence", "status", "hash", "source", "suite", "stage", "cells"}
MIB = 1 << 20
OLD = Path("tests/data/e296384")


def read_page(path: Path) -> html.HtmlElement:
    """The page, proved to be closed: nothing in it runs, and nothing is loaded."""
    text = path.read_text(encoding="utf-8")
    root = html.fromstring(text)
    assert {one.tag for one in root.iter() if isinstance(one.tag, str)} <= TAGS
    assert {name for one in root.iter() for name in one.attrib} <= ATTRIBUTES
    assert not [one for one in root.iter() if not isinstance(one.tag, str)]
    ids = Counter(root.xpath("//@id"))
    assert set(ids.values()) <= {1}
    assert all(link[0] == "#" and link[1:] in ids for link in root.xpath("//@href"))
    (policy,) = root.xpath("//meta[@http-equiv='Content-Security-Policy']/@content")
    sheet = text.partition("<style>")[2].partition("</style>")[0]
    digest = base64.b64encode(hashlib.sha256(sheet.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert all(re.fullmatch(r"(?:[MLHVhvl][-\d. ]*|m0 -6|z)*", path) for path in root.xpath("//@d"))
    assert not re.search(r"url\(|@import|expression", sheet)
    assert text.index("Content-Security-Policy") < text.index("<style>")
    return root


def words(root: html.HtmlElement, path: str = "//body") -> str:
    """Text of the elements at `path`, in one line."""
    return " ".join(" ".join(one.text_content() for one in root.xpath(path)).split())


def hostile(value: Any, key: str = "") -> Any:
    """`value` with every text in it replaced, and the keys of tables without fixed keys."""
    if isinstance(value, dict):
        free = key in {"case", "sources", "versions", "commits", "variables", "system", "transport", "stacks", "method"}
        made = {HOSTILE + name if free and name != "hash" else name: hostile(one, name) for name, one in value.items()}
        return made | ({"model": HOSTILE, "hidden_size": 7} if key == "case" else {})
    if isinstance(value, list):
        return [hostile(one, key) for one in value]
    return HOSTILE if isinstance(value, str) and key not in KEPT else value


def failing(**changes: Any) -> dict[str, Any]:
    """Report of a case that lost rows, as a run wrote it, with the table of rows sent."""
    report: dict[str, Any] = json.loads((OLD / "reports" / "under-limit.json").read_text())
    ranks = len(report["ranks"])
    sent = {"ranks_per_block": 1, "rows": [[10 * row + column for column in range(ranks)] for row in range(ranks)]}
    return report | {"sent": sent, "suite": "distbench run"} | changes


def case(number: int, **keys: Any) -> dict[str, Any]:
    """Changes that make a report one of several in a suite."""
    return {"case": {"model": "tiny", "ep_size": 2, "hash": f"{number:064d}"} | keys, "suite": "night"}


def many_cases(count: int) -> list[dict[str, Any]]:
    """Reports of a suite whose cases differ in seed, routing and limit; each tenth fails."""
    return [
        result(
            f"case {number} with a name",
            "CORRUPT" if number % 10 == 0 else "PASS",
            **case(number, seed=number, routing=str(number % 7), limit=str(number % 11)),
        )
        for number in range(count)
    ]


def ranks_1024() -> dict[str, Any]:
    """Changes that give a report 1,024 ranks, half of them above the limit, and rows sent by nodes."""
    ranks = [
        {
            "rank": rank,
            "host": f"node{rank // 8}",
            "device": "gfx942",
            "total_recv": rank,
            "tokens": 9,
            "capacity": 4096,
        }
        for rank in range(1024)
    ]
    sent = {"ranks_per_block": 8, "rows": [[(7 * row * column) % 101 for column in range(128)] for row in range(128)]}
    return {"ranks": ranks, "sent": sent, "limit": limit(512, "unsafe", 1023)}
