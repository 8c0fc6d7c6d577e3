"""Transports: dispatch and combine between ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distbench.case.spec import Case

if TYPE_CHECKING:
    from torch import Tensor

    from distbench.distributed.exchange import Exchange
    from distbench.distributed.session import Session
    from distbench.transport.base import Transport
    from distbench.workload.batch import TokenBatch


def make_transport(session: Session, case: Case, counts: Tensor, like: TokenBatch) -> Transport:
    """Return the case's transport; `counts` int64 [W, W] is the agreed routing, `like` a batch of its dtypes.

    Raises:
        Unsupported: the case's package is missing.
        InvalidCase: the package does not support the case.
    """
    if case.transport == "mori":
        from distbench.transport.mori.transport import MoriTransport  # noqa: PLC0415 - a rank loads only what it uses

        return MoriTransport(session, case)
    from distbench.distributed.all_to_all import AllToAll  # noqa: PLC0415 - as above
    from distbench.distributed.choose import choose_exchange  # noqa: PLC0415 - as above
    from distbench.transport.collective.arrival import Geometry  # noqa: PLC0415 - as above
    from distbench.transport.collective.transport import CollectiveTransport  # noqa: PLC0415

    geometry = Geometry(
        rank=session.rank,
        ep_size=case.ep_size,
        num_experts=case.num_experts,
        capacity=case.capacity,
        counts=counts,
    )
    shuffled = case.slot_order == "shuffled"
    if case.two_batch_overlap:  # exchanges of both sub-batches are under way at once, which memory is not made for
        exchange: Exchange = AllToAll(session.group)
    else:
        exchange = choose_exchange(session.group, session.shared, counts, session.device)
    return CollectiveTransport(exchange, geometry, like, seed=case.seed, shuffled=shuffled)
