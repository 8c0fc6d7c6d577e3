"""What can be found before a rank is started, with the fix."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from distbench.case import Case
from distbench.errors import InvalidCase
from distbench.experts import make_selector
from distbench.rank import workload_for


def check_case(case: Case) -> list[str]:
    """Return warnings about a case that can run.

    Raises:
        InvalidCase: inputs that cannot be made, or a kernel table that cannot be read.

    """
    workload_for(case, torch.device("cpu"))
    selector = make_selector(case)
    if case.kernel_table and not selector.tuned:
        layer = selector.layer
        return [
            f"kernel_table = {case.kernel_table}: no row for cu_num {layer.cu_count}, model_dim {layer.model_dim}, "
            f"inter_dim {layer.inter_dim}, expert {layer.num_local_experts}, topk {layer.lookup_topk(selector.rules)} "
            f"and {layer.quant}; all kernels come from heuristics"
        ]
    return []


def check_folder(out: str) -> None:
    """Make the folder for results and prove that it can be written.

    Raises:
        InvalidCase: it cannot be made or written.

    """
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        message = f"--out {out}: cannot be written ({reason}); name another folder"
        raise InvalidCase(message) from error
