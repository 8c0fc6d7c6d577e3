"""What can be found before a rank is started, with the fix. Loads no torch."""

from __future__ import annotations

import tempfile
from pathlib import Path

from distbench.case import Case
from distbench.errors import InvalidCase
from distbench.experts import make_selector
from distbench.workload.kinds import ExpertGroup, check_routing, parse_routing
from distbench.workload.plan import plan_exact


def check_case(case: Case) -> tuple[str, ...]:
    """Return warnings about a case that can run.

    Raises:
        InvalidCase: inputs that cannot be made, or a kernel table that cannot be read.

    """
    check_routing(parse_routing(case.routing), ExpertGroup(case.ep_size, case.num_experts, case.topk))
    if case.numerics == "exact":
        plan_exact(case.hidden_size, case.intermediate_size, case.topk, case.dispatch_dtype, case.num_experts)
    selector = make_selector(case)
    if not case.kernel_table or selector.tuned:
        return ()
    layer = selector.layer
    message = (
        f"kernel_table = {case.kernel_table}: no row for cu_num {layer.cu_count}, model_dim {layer.model_dim}, "
        f"inter_dim {layer.inter_dim}, expert {layer.num_local_experts}, topk {layer.lookup_topk(selector.rules)} "
        f"and {layer.quant}; all kernels come from heuristics"
    )
    return (message,)


def check_folder(out: str) -> None:
    """Make the folder for results and prove that it can be written.

    Raises:
        InvalidCase: it cannot be made or written.

    """
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as probe:
            probe.write(b"\0" * 4096)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        message = f"--out {out}: cannot be written ({reason}); name another folder"
        raise InvalidCase(message) from error
