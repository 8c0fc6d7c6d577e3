"""Case files that show what the advice says: the proven limit, one row less, and the given limit."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import tomli_w

from distbench.case.presets import CUSTOM, DIMENSIONS
from distbench.case.spec import Case
from distbench.errors import InvalidCase, is_disk_full
from distbench.report.files import write_atomically
from distbench.tools.advise.question import Question
from distbench.utils.text import printable

_KEYS = ("ep_size", "tokens", "routing", "policy", "numerics", "max_dispatch_tokens_per_rank", "dispatch_dtype")
_SLOTS = ("shared_experts", "physical_experts", "placement")


def write_case_files(folder: str, question: Question, bound: int) -> list[Path]:
    """Write the case files and return their paths; files of these names are replaced.

    Raises:
        InvalidCase: the folder cannot be written.

    """
    wanted = {"proven": bound, "one-less": bound - 1}
    if question.limit is not None:
        wanted["yours"] = question.limit
    paths: list[Path] = []
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, limit in wanted.items():
            if limit >= 1:
                path = Path(folder) / f"{name}.toml"
                write_atomically(path, _text(question.witness, limit, path).encode("utf-8", "replace"))
                paths.append(path)
    except OSError as error:
        if is_disk_full(error):
            raise
        message = f"--cases {folder!r:.200}: cannot be written ({error.strerror}); name another folder"
        raise InvalidCase(message) from error
    return paths


def _text(case: Case, limit: int, path: Path) -> str:
    asked = [key for key in ("prealloc_max_recv_tokens", *_SLOTS) if getattr(case, key)]
    named = DIMENSIONS if case.model == CUSTOM else ()
    values: dict[str, Any] = {"model": case.model} | {key: getattr(case, key) for key in (*named, *_KEYS, *asked)}
    values |= {"tokens": _tokens(case.tokens), "limit": limit}
    verdict = _verdict(case, limit)
    named_path = printable(shlex.quote(str(path)))
    head = (
        f"# By distbench advise. Every token has an expert on rank 0, which receives all of them: {verdict}.\n"
        f"# Run it:    distbench run --case {named_path} -n {case.ep_size}    (--model tiny needs less memory)\n\n"
    )
    return head + tomli_w.dumps(values)


def _verdict(case: Case, limit: int) -> str:
    total = sum(case.tokens)
    return "OVERFLOW" if total > case.capacity else "PASS" if limit >= total else "UNDER_LIMIT"


def _tokens(tokens: tuple[int, ...]) -> int | list[int]:
    return tokens[0] if len(set(tokens)) == 1 else list(tokens)
