from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

import pytest

from distbench.signals import ENDING_SIGNALS, Interrupted, collect_signals, raise_signals


@pytest.fixture(autouse=True)
def handlers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in ENDING_SIGNALS}
    monkeypatch.setattr("distbench.signals._raised", [])
    raise_signals()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Last:
    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_got_lost_in_a_destructor_is_collected() -> None:
    Last()
    with collect_signals() as received:
        assert received == [signal.SIGTERM]


def test_a_library_that_handles_every_error_does_not_handle_a_signal() -> None:
    with pytest.raises(Interrupted, match="ended by SIGTERM"), contextlib.suppress(Exception):
        os.kill(os.getpid(), signal.SIGTERM)
