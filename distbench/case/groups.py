"""Keys of a case by group, for help texts and for the file that `distbench init` writes."""

from __future__ import annotations

from typing import NamedTuple


class Group(NamedTuple):
    """Keys that belong together: `text` describes them, `units` has the placeholder of each key's value.

    A placeholder names the unit or the kind of the value; it is empty for a switch or a choice of words.
    """

    text: str
    units: dict[str, str]


GROUPS = {
    "layer": Group(
        "the MoE layer",
        {
            "profile": "NAME",
            "model": "NAME",
            "hidden_size": "COLUMNS",
            "intermediate_size": "COLUMNS",
            "num_experts": "EXPERTS",
            "topk": "EXPERTS",
            "activation": "",
            "swiglu_limit": "VALUE",
            "hidden_pad": "COLUMNS",
            "intermediate_pad": "COLUMNS",
            "bias": "",
            "doweight_stage1": "",
            "shared_experts": "EXPERTS",
            "physical_experts": "SLOTS",
            "placement": "FILE",
        },
    ),
    "batch": Group(
        "the tokens and their experts",
        {
            "tokens": "TOKENS",
            "routing": "PATTERN",
            "replica_choice": "",
            "dropped_slots": "SHARE",
            "dropped_tokens": "SHARE",
            "seed": "SEED",
        },
    ),
    "limit": Group(
        "the cut and the receive buffer",
        {
            "limit": "ROWS",
            "policy": "",
            "recv_bound": "",
            "sglang_version": "VERSION",
            "two_batch_overlap": "",
            "tp_size": "RANKS",
            "sender_rows": "TOKENS",
            "max_dispatch_tokens_per_rank": "TOKENS",
            "prealloc_max_recv_tokens": "TOKENS",
        },
    ),
    "numerics": Group(
        "number formats, inputs and comparison",
        {"dispatch_dtype": "", "fp8_format": "", "numerics": "", "require": "", "gather": "", "slot_order": ""},
    ),
    "parts": Group(
        "libraries and device",
        {
            "transport": "NAME",
            "transport_option": "NAME=VALUE",
            "experts": "NAME",
            "experts_option": "NAME=VALUE",
            "emulate": "",
            "device": "",
            "share_devices": "",
        },
    ),
    "mori": Group(
        "transport mori",
        {
            "mori_kernel": "",
            "inter_kernel_switch": "TOKENS",
            "gpu_per_node": "RANKS",
            "combine_quant": "",
            "combine_input": "",
            "launch_mode": "",
            "mori_geometry": "",
            "mori_habits": "NAMES",
        },
    ),
    "aiter": Group(
        "kernels of the experts and their selection",
        {
            "kernel_table": "CSV",
            "aiter_ksplit": "PARTS",
            "aiter_bypass_tune": "",
            "aiter_version": "VERSION",
            "cu_count": "UNITS",
            "sorting_policy": "0|1|2",
            "aiter_habits": "NAMES",
        },
    ),
    "caller": Group(
        "production's own code",
        {
            "caller": "NAME",
            "caller_wheel": "FILE",
            "caller_folder": "DIR",
            "atom_rule": "",
            "atom_graph_bs": "TOKENS",
        },
    ),
    "faults": Group(
        "repeats and injected faults",
        {"repeats": "TIMES", "until_failure": "", "jitter": "MILLISECONDS", "inject": "FAULTS"},
    ),
    "timing": Group(
        "timed iterations",
        {
            "iterations": "TIMES",
            "warmup": "TIMES",
            "median_error": "SHARE",
            "flush_l2": "",
            "align": "",
            "graph": "",
        },
    ),
    "timeouts": Group("time limits", {"timeout": "SECONDS", "stage_timeouts": "STAGE=SECONDS"}),
}
"""Groups by the word that `--help=WORD` takes; each key that is a flag is in one of them."""

UNITS = {key: unit for group in GROUPS.values() for key, unit in group.units.items()}
"""Placeholder of each key."""

COMMON = {
    "model": "a preset, or a config.json (default: qwen3-30b-a3b)",
    "tokens": "of each rank: one number, or a list (default: 16)",
    "routing": "uniform, zipf:S, hot-rank:R, … (default: uniform)",
    "limit": "rows kept: off, 4k, max-recv, … (default: sum32)",
    "policy": "limit too small: strict, unchecked or guard",
    "dispatch_dtype": "payload: bf16 or fp8 (default: bf16)",
    "transport": "collective, mori or a plugin (default: collective)",
    "experts": "reference, triton, aiter or a plugin (reference)",
    "device": "auto, cpu or cuda (default: auto)",
    "iterations": "timed iterations of each arm (default: 0)",
}
"""Keys that most cases set, each with a text of one line."""

COUNTS = frozenset(key for key, unit in UNITS.items() if unit in ("TOKENS", "ROWS"))
"""Keys whose value is a number of tokens or rows, or has some in it."""
