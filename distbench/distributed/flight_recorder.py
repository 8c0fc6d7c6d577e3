"""torch's flight recorder of NCCL collectives, in its JSON form: which device has not reached which collective.

The recorder runs unless TORCH_FR_BUFFER_SIZE is 0. It numbers the collectives of each process group and records for
each whether the host scheduled it, whether it started on the device (see START_EVENTS), and whether it completed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

START_EVENTS = "TORCH_NCCL_ENABLE_TIMING"
"""Environment variable; 1 makes torch record an event at the start of each collective."""

_MARK = "NCCL flight recorder: "
_STATES = ("scheduled", "started", "completed")


class _Collective(msgspec.Struct):
    """An entry of the recorder, reduced to the fields read here. `process_group` is a name and a description."""

    process_group: list[str]
    collective_seq_id: int
    profiling_name: str
    state: str
    is_p2p: bool = False
    retired: bool = False


class _Recording(msgspec.Struct):
    entries: list[_Collective] = []


class Group(msgspec.Struct, frozen=True):
    """State of one process group in one rank's recorder.

    `entered` is the number of the last collective that the host entered, `name` its name. `pending` is the number of
    the first incomplete one, 0 where all are complete, `pending_name` its name, and `state` its progress.
    """

    group: str
    entered: int
    name: str
    pending: int = 0
    pending_name: str = ""
    state: str = ""


def last_collectives(recording: bytes | str) -> list[Group]:
    """State of each process group in a JSON recording; empty for any other text."""
    try:
        entries = msgspec.json.decode(recording, type=_Recording).entries
    except msgspec.DecodeError:
        return []
    found: dict[str, Group] = {}
    for entry in entries:
        if entry.is_p2p or not entry.process_group or entry.state not in _STATES:
            continue
        name = entry.process_group[0]
        group = msgspec.structs.replace(
            found.get(name, Group(name, 0, "")), entered=entry.collective_seq_id, name=entry.profiling_name
        )
        if not (entry.retired or entry.state == "completed" or group.pending):
            pending = {"pending": group.entered, "pending_name": group.name, "state": entry.state}
            group = msgspec.structs.replace(group, **pending)
        found[name] = group
    return list(found.values())


def as_line(groups: Iterable[Group]) -> str:
    """The line that follows a rank's stacks."""
    return _MARK + msgspec.json.encode(list(groups)).decode()


def from_stacks(text: str) -> dict[str, Group]:
    """Process groups by name, from the last recorder line in a rank's stacks."""
    line = next((line for line in reversed(text.splitlines()) if line.startswith(_MARK)), "")
    try:
        groups = msgspec.json.decode(line.removeprefix(_MARK), type=list[Group])
    except msgspec.DecodeError:
        return {}
    return {group.group: group for group in groups}


class Late(msgspec.Struct, frozen=True):
    """Ranks that others wait for on the device, and the collective in which they are late."""

    ranks: set[int]
    told: str


def late_ranks(recorded: Mapping[int, Mapping[str, Group]]) -> Late | None:
    """Ranks that have not entered a collective that others have, or whose device has not begun it.

    `recorded` holds each rank's recorder state. None where the recorders show no difference.
    """
    for name in dict.fromkeys(name for groups in recorded.values() for name in groups):
        members = {rank: groups[name] for rank, groups in recorded.items() if name in groups}
        late = _not_entered(members) or _not_begun(members)
        if late is not None:
            return late
    return None


def _not_entered(members: Mapping[int, Group]) -> Late | None:
    least = min(group.entered for group in members.values())
    ahead = next((group for group in members.values() if group.entered > least), None)
    if ahead is None:
        return None
    behind = {rank for rank, group in members.items() if group.entered == least}
    which = f"{ahead.name} {least + 1}" if ahead.entered == least + 1 else f"collective {least + 1}"
    return Late(behind, f"has not entered {which} of NCCL group {ahead.group}")


def _not_begun(members: Mapping[int, Group]) -> Late | None:
    """Ranks whose device is behind the others in the first incomplete collective."""
    pending = {rank: group for rank, group in members.items() if group.pending}
    if not pending:
        return None
    reached = {rank: (group.pending, _STATES.index(group.state)) for rank, group in pending.items()}
    least = min(reached.values())
    behind = {rank for rank, at in reached.items() if at == least}
    if behind == members.keys():
        return None
    group = pending[min(behind)]
    return Late(behind, f"has not begun {group.pending_name} {group.pending} of NCCL group {group.group}")
