"""vLLM: the definitions that its caller lifts, its launch geometry, and the variables of its ROCm paths."""

from __future__ import annotations

import ast
import copy
import re
from types import SimpleNamespace
from typing import Any

import torch

from distbench.callers.vllm.definitions import DEFINITIONS
from distbench.case.vllm_env import known_variables
from distbench.transport.mori.config import plan_mori
from tests.cases import tiny_case
from tests.contract.facts.fact import Fact
from tests.contract.facts.lifted import lifted_facts
from tests.contract.facts.source import Source, execute

PACKAGE = "vllm"
MANAGER = "vllm/distributed/device_communicators/all2all.py"
ENVS = "vllm/envs.py"

_UNITS = {"gfx942": 304, "gfx950": 256}
_ARGUMENTS = (
    *("rank", "num_ep_ranks", "input_dtype", "quant_dtype", "token_hidden_size", "scale_dim", "scale_type_size"),
    *("max_num_tokens_per_dp_rank", "num_local_experts", "num_experts_per_token"),
)
_OURS = ("kernel_type", "block_num", "rdma_block_num", "warp_num_per_block")
_DEFAULTS_OF_MORI = ("num_qp_per_pe", "quant_type", "use_external_inp_buf", "max_total_recv_tokens")


class _Kernels:
    """`mori.ops.EpDispatchCombineKernelType`: each kernel type is its own name."""

    def __getattr__(self, name: str) -> str:
        return name


_MORI = SimpleNamespace(ops=SimpleNamespace(EpDispatchCombineKernelType=_Kernels()))


def _geometry(source: Source) -> dict[str, tuple[Any, ...]]:
    """Kernel type and launch within a node and between nodes, by architecture, and settings left to MoRI's defaults."""
    node = copy.deepcopy(source.definition(MANAGER, "MoriAll2AllManager._make_all2all_kwargs"))
    node.body = [one for one in node.body if not isinstance(one, ast.Import | ast.ImportFrom)]
    for argument in node.args.args:
        argument.annotation = None
    found: dict[str, tuple[Any, ...]] = {}
    for arch in _UNITS:
        given = {f"on_{name}": (lambda name=name, arch=arch: name == arch) for name in _UNITS}
        make = execute([node], MANAGER, {"mori": _MORI} | given)["_make_all2all_kwargs"]
        for internode in (False, True):
            manager = SimpleNamespace(internode=internode, _all2all_backend="mori_high_throughput")
            values = make(manager, **dict.fromkeys(_ARGUMENTS, 8) | {"input_dtype": torch.bfloat16})
            left = tuple(name for name in _DEFAULTS_OF_MORI if name not in values)
            found[f"{arch}, internode {internode}"] = (*(values[name] for name in _OURS), left)
    return found


def _our_geometry(_: str) -> dict[str, tuple[Any, ...]]:
    found: dict[str, tuple[Any, ...]] = {}
    for arch, units in _UNITS.items():
        for internode in (False, True):
            values = {"profile": "vllm", "emulate": True, "cu_count": units, "gpu_per_node": 4 if internode else 8}
            plan = plan_mori(tiny_case(8, **values), {})
            assert (plan.num_qp_per_pe, plan.quant, plan.external, plan.max_total_recv_tokens) == (1, "none", True, 0)
            found[f"{arch}, internode {internode}"] = (plan.kernel, *plan.launch, _DEFAULTS_OF_MORI)
    return found


def _variables(source: Source) -> set[str]:
    return set(re.findall(r'"(VLLM_ROCM_[A-Z0-9_]+)": ', source.read(ENVS)))


FACTS = (
    Fact("launch geometry of each node and architecture", PACKAGE, MANAGER, _geometry, _our_geometry),
    Fact("variables of vLLM's ROCm paths", PACKAGE, ENVS, _variables, lambda _: set(known_variables())),
    *lifted_facts(PACKAGE, DEFINITIONS),
)
