"""Transports: dispatch and combine between ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distbench.case.plugins import Plugin, is_trusted, load_plugin, options_of
from distbench.case.spec import Case

if TYPE_CHECKING:
    from torch import Tensor

    from distbench.distributed.session import Session
    from distbench.transport.base import Transport
    from distbench.workload.batch import TokenBatch


def make_transport(
    session: Session, case: Case, counts: Tensor, like: TokenBatch, brought: Plugin | None = None
) -> Transport:
    """Return the case's transport; `counts` int64 [W, W] is the agreed routing, `like` a batch of its dtypes.

    It is that of a plugin where its process has `brought` one. Collective where it is a plugin's.

    Raises:
        Unsupported: the case's package is missing, or does not state what the case needs.
        InvalidCase: the package does not support the case, or an option of the plugin is wrong.
        BrokenContract: a plugin's factory raises, or returns no transport.
    """
    from distbench.transport.base import TransportContext  # noqa: PLC0415 - loads torch

    name = case.transport
    context = TransportContext(case, None, session.rank, session.device, session.group, counts, like, session)
    if is_trusted("transport", name):
        made: Transport = load_plugin("transport", name).make(context)
        return made
    from distbench.case.contract import check_stated  # noqa: PLC0415 - only for plugins
    from distbench.transport.contract import CheckedTransport  # noqa: PLC0415 - only around plugins

    with session.together():
        plugin = brought or load_plugin("transport", name)
        check_stated(plugin, "transport", case, session.device.type)
        context = context._replace(options=options_of(plugin, "transport_option", case.transport_option))
        return CheckedTransport(context, plugin)
