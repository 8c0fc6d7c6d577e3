"""What moves rows between ranks."""

from __future__ import annotations

from torch import Tensor

from distbench.case import Case
from distbench.errors import Unsupported
from distbench.session import Session
from distbench.transport.base import Transport
from distbench.transport.collective import CollectiveTransport, Geometry
from distbench.workload.batch import TokenBatch


def make_transport(session: Session, case: Case, counts: Tensor, like: TokenBatch) -> Transport:
    """Return the case's transport; `counts` int64 [W, W] is the agreed routing, `like` a batch of its dtypes."""
    if case.transport != "collective":
        message = f"transport {case.transport}: not in this version; choose collective"
        raise Unsupported(message)
    geometry = Geometry(
        rank=session.rank,
        ep_size=case.ep_size,
        num_experts=case.num_experts,
        capacity=case.capacity,
        counts=counts,
    )
    shuffled = case.slot_order == "shuffled"
    return CollectiveTransport(session.group, geometry, like, seed=case.seed, shuffled=shuffled)
