"""Host names from a list, a host file or a Slurm node list.

A host file has one host a line, as MPI launchers and schedulers write them: `host`, `host slots=8` (Open MPI,
DeepSpeed), `host:8` (MPICH), a host once a slot (PBS, LSF), or `node[01-04]` (Slurm, pdsh); `#` begins a comment.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import product

import msgspec

from distbench.errors import InvalidCase
from distbench.utils.text import shown

MOST_HOSTS = 65536

_FIX = "give each node once: --nodes a,b,node[01-04] or --nodes @FILE"

_HOST_NAME = re.compile(r"(?!\d+\Z)[A-Za-z0-9]([A-Za-z0-9._-]{0,252}[A-Za-z0-9])?")  # a number is slots, somewhere
_ENTRY = re.compile(r"(?:\[[^\]]*\]|[^\s,\[])+")
_RANGE = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?", re.ASCII)
_BRACKETS = re.compile(r"\[([^\[\]]*)\]")
_COUNT = re.compile(r"(.+):(\d{1,6})", re.ASCII)
_NESTED = re.compile(r"\[[^\]]*\[")
_SLOTS = re.compile(r"(slots|max[_-]slots|cpu)=(\d{1,6})", re.ASCII)


class HostList(msgspec.Struct, frozen=True):
    """Host names in order, each once, and the slots that a host file gives to some of them."""

    names: tuple[str, ...]
    slots: dict[str, int]


def parse_hosts(text: str) -> HostList:
    """Hosts of a list such as `a,b:8,node[01-04,07]`, each named once.

    Raises:
        InvalidCase: no host, a host twice, or an entry that is no host name.

    """
    named = list(_hosts(text))
    repeated = [name for name, count in Counter(name for name, _ in named).items() if count > 1]
    if repeated or not named:
        found = f"{repeated[0]} is named twice" if repeated else "no name"
        message = f"nodes: {found}; {_FIX}"
        raise InvalidCase(message)
    return HostList(tuple(name for name, _ in named), {name: slots for name, slots in named if slots is not None})


def parse_host_file(text: str, origin: str) -> HostList:
    """Hosts of a host file; `origin` names it in messages. A host on several lines has one slot per line.

    Raises:
        InvalidCase: a line of another form, or no host at all; names the line.

    """
    slots: Counter[str] = Counter()
    counted: set[str] = set()
    for number, line in enumerate(text.removeprefix("\ufeff").splitlines(), 1):
        for name, given in _line(line.partition("#")[0], f"{origin}, line {number}"):
            slots[name] += 1 if given is None else given
            counted |= {name} if given is not None or slots[name] > 1 else set()
    if not slots:
        message = f"{origin}: no host; name a file with one host a line"
        raise InvalidCase(message)
    return HostList(tuple(slots), {name: slots[name] for name in slots if name in counted})


def _line(text: str, origin: str) -> list[tuple[str, int | None]]:
    try:
        return list(_hosts(text))
    except InvalidCase as error:
        message = f"{origin}: {error}"
        raise InvalidCase(message) from error


def _hosts(text: str) -> Iterator[tuple[str, int | None]]:
    """Yield the hosts of a list or a line with their slots, None where no number is given."""
    if _NESTED.search(text) or text.count("[") != text.count("]"):
        message = f"nodes {shown(text)}: brackets do not match; write node[01-04,07]"
        raise InvalidCase(message)
    entries = _ENTRY.findall(text)
    count = _slots([entry for entry in entries if "=" in entry])
    for entry in (entry for entry in entries if "=" not in entry):
        numbered = _COUNT.fullmatch(entry)
        for name in _expand(numbered[1] if numbered else entry):
            yield name, int(numbered[2]) if numbered else count


def _slots(options: Sequence[str]) -> int | None:
    """Slots given by the options that follow a host; None for none."""
    count = None
    for option in options:
        found = _SLOTS.fullmatch(option)
        if found is None:
            message = f"{shown(option)}: allowed behind a host are slots=N, max_slots=N and cpu=N; drop it"
            raise InvalidCase(message)
        count = count if found[1].startswith("max") else int(found[2])
    return count


def _expand(entry: str) -> Iterator[str]:
    """Yield the hosts of one entry, such as rack[1-2]n[01-04]-ib; the last bracket varies fastest."""
    texts = _BRACKETS.split(entry)
    choices = [list(_numbers(part, entry)) if index % 2 else [part] for index, part in enumerate(texts)]
    count = 1
    for one in choices:
        count *= len(one)
    if count > MOST_HOSTS:
        message = f"{shown(entry)}: {count} hosts, allowed are {MOST_HOSTS}"
        raise InvalidCase(message)
    for parts in product(*choices):
        name = "".join(parts)
        if not _HOST_NAME.fullmatch(name):
            message = f"nodes: {name!r:.80} is no host name; {_FIX}"
            raise InvalidCase(message)
        yield name


def _numbers(text: str, entry: str) -> Iterator[str]:
    """Yield the numbers of `01-04,07`, zero-padded like the first number of a range."""
    for part in text.split(","):
        found = _RANGE.fullmatch(part.strip())
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if found is None or last < first or last - first >= MOST_HOSTS:
            message = f"{shown(entry)}: {part!r:.40} is no range of up to {MOST_HOSTS} numbers; write node[01-04,07]"
            raise InvalidCase(message)
        yield from (str(number).zfill(len(found[1])) for number in range(first, last + 1))
