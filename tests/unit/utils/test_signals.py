from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

import pytest

from distbench.utils.signals import ENDING_SIGNALS, Interrupted, collect_signals, raise_signals


@pytest.fixture(autouse=True)
def handlers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in ENDING_SIGNALS}
    monkeypatch.setattr("distbench.utils.signals._raised", [])
    raise_signals()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Last:
    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_signal_swallowed_in_a_destructor_is_collected_afterwards() -> None:
    Last()
    with collect_signals() as received:
        assert received == [signal.SIGTERM]


def test_signal_passes_through_an_except_exception_block() -> None:
    with pytest.raises(Interrupted, match="ended by SIGTERM"), contextlib.suppress(Exception):
        os.kill(os.getpid(), signal.SIGTERM)
