"""The interface of plugins: a transport, experts, a caller or a fault of another package (docs/plugins.md).

Names here change with a major version of distbench only. Loads torch.
"""

from __future__ import annotations

from distbench.callers.base import Call, Caller, CallerContext, Steps
from distbench.callers.text import CallerText
from distbench.case.plugins import Plugin
from distbench.case.spec import Case
from distbench.errors import BrokenContract, InvalidCase, Unsupported
from distbench.experts.base import ExpertInput, Experts, ExpertsAround, ExpertsContext, ExpertWeights
from distbench.experts.reference import make as reference_experts
from distbench.experts.roundings import Roundings
from distbench.experts.selection.choice import KernelChoice
from distbench.faults.base import Fault, Scene
from distbench.faults.options import Option, one_of, real, whole
from distbench.transport.base import (
    Dispatched,
    Transport,
    TransportAround,
    TransportContext,
    WholeTransport,
    poison_,
)
from distbench.transport.collective.transport import make as collective_transport
from distbench.transport.sum_order import SumOrder
from distbench.workload.batch import TokenBatch

__all__ = [
    "BrokenContract",
    "Call",
    "Caller",
    "CallerContext",
    "CallerText",
    "Case",
    "Dispatched",
    "ExpertInput",
    "ExpertWeights",
    "Experts",
    "ExpertsAround",
    "ExpertsContext",
    "Fault",
    "InvalidCase",
    "KernelChoice",
    "Option",
    "Plugin",
    "Roundings",
    "Scene",
    "Steps",
    "SumOrder",
    "TokenBatch",
    "Transport",
    "TransportAround",
    "TransportContext",
    "Unsupported",
    "WholeTransport",
    "collective_transport",
    "one_of",
    "poison_",
    "real",
    "reference_experts",
    "whole",
]
