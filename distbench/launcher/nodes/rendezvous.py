"""torchrun's rendezvous over a store whose socket this package opened: on loopback, or towards the other nodes.

torch's own handlers make the store listen on all addresses of a machine, without authentication.
"""

from __future__ import annotations

from datetime import timedelta

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined] # public, but not in its __all__
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

from distbench.launcher.job import NodeLayout
from distbench.launcher.nodes.protocol import BACKEND


class OwnStore(RendezvousHandler):
    """Nodes in the order of their numbers, as with torchrun's `static`; node 0 hosts the store."""

    def __init__(self, layout: NodeLayout, run_id: str, timeout_s: float, listener: int | None) -> None:
        """`listener` is node 0's listening socket, a descriptor that the store closes; None on other nodes."""
        self._layout = layout
        self._run_id = run_id
        self._timeout = timedelta(seconds=timeout_s)
        self._listener = listener

    def get_backend(self) -> str:
        """Name in torchrun's registry."""
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        """Whether ranks use this store instead of one of their own."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Join the other nodes.

        Raises:
            torch.distributed.DistError: they did not join in time.

        """
        layout = self._layout
        hosts, meeting = self._listener is not None, (layout.host, layout.port)
        store = TCPStore(*meeting, layout.nodes, hosts, self._timeout, master_listen_fd=self._listener)
        self._listener = None
        known = PrefixStore(self._run_id, store)
        return RendezvousInfo(known, layout.node, layout.nodes, RendezvousStoreInfo(*meeting))

    def is_closed(self) -> bool:
        """Never: a launch is not joined again."""
        return False

    def set_closed(self) -> None:
        """Do nothing."""

    def num_nodes_waiting(self) -> int:
        """None: the number of nodes is fixed."""
        return 0

    def get_run_id(self) -> str:
        """Name of the launch."""
        return self._run_id

    def shutdown(self) -> bool:
        """Do nothing; the store ends with its process or this object."""
        return True


def _make(parameters: RendezvousParameters) -> RendezvousHandler:
    given = parameters.config
    return OwnStore(given["spread"], parameters.run_id, given["timeout"], given["listener"])


def register() -> None:
    """Make the backend known to torchrun's agent."""
    rendezvous_handler_registry.register(BACKEND, _make)
