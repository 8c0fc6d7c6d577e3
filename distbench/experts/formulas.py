"""The arithmetic that a case asks of its experts, and the implementations that have it. Loads no torch."""

from __future__ import annotations

from distbench.case.spec import Case
from distbench.errors import Unsupported
from distbench.workload.formula import Formula


def formula_of(case: Case) -> Formula:
    """Return the arithmetic of the experts of `case`."""
    return Formula(
        activation=case.activation,
        swiglu_limit=case.swiglu_limit,
        bias=case.bias,
        weigh_first=case.doweight_stage1,
    )


def check_triton_formula(case: Case) -> None:
    """Refuse what the Triton experts do not compute.

    Raises:
        Unsupported: names the first such key, and the experts that compute it.
    """
    asked = {
        f"activation {case.activation}": case.activation != "silu",
        f"swiglu_limit {case.swiglu_limit:g}": bool(case.swiglu_limit),
        "bias": case.bias,
        "doweight_stage1": case.doweight_stage1,
    }
    for what, is_so in asked.items():
        if is_so:
            message = (
                f"experts triton: {what}: the kernels compute SiLU(gate) * up alone; use experts reference or aiter"
            )
            raise Unsupported(message)
