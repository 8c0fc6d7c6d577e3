"""Keys of a case that a flag, a case file or a suite sets, and that this case does not use, each with the reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from distbench.case.entry import Entry
from distbench.case.resolve import FLAGS
from distbench.case.spec import FIELD_DEFAULTS, Case
from distbench.case.suite import value_text
from distbench.utils.text import counted

_MORI_KEYS = ("combine_quant", "combine_input", "launch_mode", "mori_geometry", "mori_habits")
# SGLang's receive bound depends on the kernel that production would choose, whatever transport runs here.
_KERNEL_KEYS = ("mori_kernel", "gpu_per_node", "inter_kernel_switch")
_AITER_RULES = ("aiter_ksplit", "aiter_bypass_tune", "aiter_version")
_ATOM_KEYS = ("caller_folder", "atom_rule", "atom_graph_bs")
_TIMING_KEYS = ("warmup", "median_error", "flush_l2", "align")
_FILES = ("file:", "suite:")
_SHOWN_CHARACTERS = 60


def unused_keys(case: Case, sources: Mapping[str, str]) -> tuple[str, ...]:
    """One line that lists the keys with values and reasons, or none.

    `sources` is the origin of each key's value. Values of the environment have a line of their own
    (launcher/unused_variables.py), and a value that equals the default asks for nothing.
    """
    reasons: dict[str, list[str]] = {}
    for key, default in FIELD_DEFAULTS.items():
        value, source = getattr(case, key), sources.get(key, "")
        if value == default or not (source == FLAGS or source.startswith(_FILES)):
            continue
        reason = _reason(key, case)
        if reason:
            reasons.setdefault(reason, []).append(f"{key}={value_text(value):.{_SHOWN_CHARACTERS}}")
    if not reasons:
        return ()
    listed = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in reasons.items())
    return (f"keys set and not used by this case: {listed}",)


def note_of_keys(entries: Sequence[Entry]) -> str:
    """One line about the cases of a suite, or nothing: the most frequent list, and the number of cases with one."""
    lines = Counter(line for one in entries for line in unused_keys(one.case, one.sources))
    if not lines:
        return ""
    (line, count), *_ = lines.most_common(1)
    others = f"; reports have {len(lines) - 1} other lists" if len(lines) > 1 else ""
    return f"{count} of {counted(len(entries), 'case')}: {line}{others}"


def _reason(key: str, case: Case) -> str:
    """Reason why the case does not use the key, or nothing where it does."""
    for keys, is_used, reason in (
        (("recv_bound",), case.limit == "off", "only with the limit off"),
        (("caller_wheel",), case.caller != "own", "only with a caller"),
        (("replica_choice",), bool(case.physical_experts), "no expert has a replica"),
        (_ATOM_KEYS, case.caller == "atom", "only with caller atom"),
        (("emulate",), _emulates(case) or case.uses_fp8, "neither mori nor aiter runs"),  # fp8: it names the format
        (_TIMING_KEYS, bool(case.iterations), "nothing is timed: iterations is 0"),
    ):
        if key in keys:
            return "" if is_used else reason
    return _reason_of_transport(key, case) or _reason_of_experts(key, case)


def _reason_of_transport(key: str, case: Case) -> str:
    if key == "slot_order" and case.transport in ("mori", "symmetric"):
        return f"transport {case.transport} has an order of its own"
    if key == "mori_habits" and case.transport == "mori" and not case.emulate:
        return "only with emulate"
    bounded = case.limit_key == "recv_bound"
    if case.transport == "mori" or not (key in _MORI_KEYS or (key in _KERNEL_KEYS and not bounded)):
        return ""
    return f"transport {case.transport} does not use it"


def _reason_of_experts(key: str, case: Case) -> str:
    if key in ("aiter_habits", "sorting_policy") and case.experts != "aiter":
        return f"experts {case.experts} do not use it"
    if case.experts == "triton" and (key in _AITER_RULES or (key == "cu_count" and not case.emulate)):
        return "experts triton have their own tables"
    return ""


def _emulates(case: Case) -> bool:
    return case.transport == "mori" or case.experts == "aiter"
