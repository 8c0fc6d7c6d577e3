"""Experts of one's own in a plain script: `python own_experts.py` prints PASS, and what was compared."""

import torch
from torch.nn.functional import silu

from distbench import api
from distbench.plugins import Experts, KernelChoice, Roundings, Unsupported


class OwnExperts(Experts):
    """A fused MoE in plain torch, row by row."""

    def __init__(self, context):
        if context.case.dispatch_dtype != "bf16":
            message = "own_experts takes bf16 rows only"
            raise Unsupported(message)
        self.columns = context.case.hidden_size

    def selection(self, rows):
        return KernelChoice.named(rows, "own fused_moe")  # one kernel for any number of rows

    def roundings(self, choice):
        return Roundings()  # bf16 intermediate and routes, one rounding of their float32 sum

    def __call__(self, given, weights):
        local = (weights.mask.cumsum(0) * weights.mask - 1).tolist()  # -1: an expert of another rank
        made = torch.zeros(given.rows, self.columns)
        for row in range(min(int(given.num_local_tokens), given.rows)):
            for weight, expert in zip(given.weights[row], given.ids[row].tolist(), strict=True):
                if local[expert] >= 0:
                    gate, up = (weights.w1[local[expert]].float() @ given.hidden[row].float()).chunk(2)
                    middle = (silu(gate) * up).bfloat16().float()
                    made[row] += ((weights.w2[local[expert]].float() @ middle) * weight).bfloat16().float()
        return made.bfloat16()


if __name__ == "__main__":
    report = api.run(api.Case(model="tiny", tokens=[3, 5], experts=OwnExperts, device="cpu"), ranks=2)
    print(report)
    raise SystemExit(report.exit_code)
