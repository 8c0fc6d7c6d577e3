"""Skip tests marked `gpu` on a machine without an accelerator; restore the variables that a test's commands set.

A shell starts a job in the background with SIGINT and SIGQUIT ignored, nohup with SIGHUP ignored, and processes that
tests start and send signals to would inherit that.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# A slow machine fails no property.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

for number, handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGQUIT, signal.SIG_DFL),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch  # noqa: PLC0415 - most test runs ask for no accelerator

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs an accelerator, and torch sees none here"))


@pytest.fixture(autouse=True)
def _variables_restored() -> Iterator[None]:
    """A command run in this process sets variables for the ranks that it forks, such as GLOO_SOCKET_IFNAME=lo.

    They would reach the processes that later tests start: ranks on emulated hosts then never meet.
    """
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
