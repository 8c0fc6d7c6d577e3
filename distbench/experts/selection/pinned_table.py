"""A kernel table with one kernel for all row counts, so that a cut changes the rows and nothing else."""

from __future__ import annotations

import csv
import io

from distbench.experts.selection.choice import KernelChoice, KernelSelector
from distbench.experts.selection.releases import padded_rows
from distbench.experts.selection.tuned_table import REQUIRED_COLUMNS, TunedKey

_MOST_BITS = 41


def pinned_table(selector: KernelSelector, choice: KernelChoice) -> bytes:
    """Return a table in tuned_fmoe format that names the kernel of `choice` in each bucket of the layer."""
    key = TunedKey.for_layer(selector.layer, selector.rules)
    values = {
        "cu_num": key.cu_num,
        "model_dim": key.model_dim,
        "inter_dim": key.inter_dim,
        "expert": key.expert,
        "topk": key.topk,
        "act_type": key.act_type or "ActivationType.Silu",
        "dtype": key.dtype,
        "q_dtype_a": key.q_dtype_a,
        "q_dtype_w": key.q_dtype_w,
        "q_type": key.q_type,
        "use_g1u1": int(key.use_g1u1),
        "doweight_stage1": int(key.doweight_stage1),
        "block_m": choice.block_m,
        "ksplit": choice.ksplit,
        "kernelName1": choice.stage1,
        "kernelName2": choice.stage2,
        "run_1stage": int(choice.run_1stage),
    }
    buckets = {padded_rows(1 << bits, selector.rules) for bits in range(_MOST_BITS)} | set(selector.rules.tiers)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, (*REQUIRED_COLUMNS, "run_1stage"), lineterminator="\n")
    writer.writeheader()
    writer.writerows(values | {"token": bucket} for bucket in sorted(buckets))
    return text.getvalue().encode()
