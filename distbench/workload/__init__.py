"""The bits that go in, the same on every rank and device, and the bits that must come out."""

from distbench.workload.batch import TokenBatch
from distbench.workload.bits import shuffle
from distbench.workload.inputs import Workload, make_workload
from distbench.workload.quantize import dequantize, quantize_fp8_blocks
from distbench.workload.routing import destinations, parse_routing, recv_counts

__all__ = [
    "TokenBatch",
    "Workload",
    "dequantize",
    "destinations",
    "make_workload",
    "parse_routing",
    "quantize_fp8_blocks",
    "recv_counts",
    "shuffle",
]
