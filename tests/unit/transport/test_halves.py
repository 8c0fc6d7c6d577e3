"""Halves of a transport whose dispatch and combine are one call each."""

from __future__ import annotations

import pytest
import torch

from distbench.errors import DistbenchError
from tests.brought_plugins import Alone
from tests.unit.transport.test_contract import context


def test_receive_half_without_its_send_half_is_refused_by_name() -> None:
    given = context()
    transport = Alone(given)
    with pytest.raises(DistbenchError, match=r"dispatch_recv\(\) was called without dispatch_send\(\)"):
        transport.dispatch_recv()
    transport.dispatch_send(given.like)
    rows = transport.dispatch_recv().hidden
    with pytest.raises(DistbenchError, match=r"dispatch_recv\(\) was called without dispatch_send\(\)"):
        transport.dispatch_recv()
    with pytest.raises(DistbenchError, match=r"combine_recv\(\) was called without combine_send\(\)"):
        transport.combine_recv()
    transport.combine_send(rows, given.like.ids)
    assert torch.equal(transport.combine_recv(), given.like.hidden)
    with pytest.raises(DistbenchError, match=r"combine_recv\(\) was called without combine_send\(\)"):
        transport.combine_recv()
