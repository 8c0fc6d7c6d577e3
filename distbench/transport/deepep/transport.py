"""The transport deepep: its options, and the kernels that they choose."""

from __future__ import annotations

from typing import Literal

import msgspec

from distbench.case.plugins import Plugin
from distbench.errors import Unsupported
from distbench.transport.base import Transport, TransportContext
from distbench.transport.deepep.package import Package


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of transport deepep."""

    mode: Literal["normal", "low-latency"] = "normal"


def make(context: TransportContext) -> Transport:
    """Return the transport of a rank. Collective.

    Raises:
        Unsupported: see `NormalTransport` and `LowLatencyTransport`; or fp8 rows for low-latency kernels.
    """
    package = Package()
    if context.options.mode == "normal":
        from distbench.transport.deepep.normal import NormalTransport  # noqa: PLC0415 - a rank loads what it uses

        return NormalTransport(context, package)
    if context.like.scales is not None:
        message = (
            "transport deepep: dispatch_dtype = fp8: low-latency kernels quantise bf16 rows themselves, and send none "
            "that are fp8 already; use bf16, or mode=normal"
        )
        raise Unsupported(message)
    from distbench.transport.deepep.low_latency import LowLatencyTransport  # noqa: PLC0415 - as above

    return LowLatencyTransport(context, package)


PLUGIN = Plugin(make=make, name="deepep", devices=("cuda",), options=Options)
