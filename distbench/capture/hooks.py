"""Wrappers of a dispatcher's method, put on and taken off. Loads no torch."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from distbench.capture.settings import Settings, from_environment, tell

if TYPE_CHECKING:
    from distbench.capture.recorder import Recorder

Wrap = Callable[[Callable[..., Any], "Recorder"], Callable[..., Any]]
"""Makes the method that records, of the method and the recorder."""
Open = Callable[[type, Settings, str], AbstractContextManager[None]]


@contextmanager
def recording(dispatcher: type, method: str, wrap: Wrap, settings: Settings, source: str) -> Iterator[None]:
    """Record what `method` of the class `dispatcher` dispatches, in all its objects, while the context is open."""
    from distbench.capture.recorder import Recorder  # noqa: PLC0415 - torch, where a capture is asked for

    original, recorder = vars(dispatcher)[method], Recorder(settings, source)
    setattr(dispatcher, method, wrap(original, recorder))
    try:
        yield
    finally:
        setattr(dispatcher, method, original)
        recorder.end()


def activate(package: str, module: str, name: str, open_on: Open, environ: Mapping[str, str]) -> None:
    """Record for as long as the process lives, if the environment asks for it; an error is a line on standard error."""
    try:
        settings = from_environment(environ)
        if settings is None or package in _ACTIVE:
            return
        dispatcher = getattr(importlib.import_module(module), name)
        _ACTIVE[package] = opened = open_on(dispatcher, settings, f"{package} {importlib.metadata.version(package)}")
        opened.__enter__()
    except Exception as error:  # noqa: BLE001 - whatever it is, the server goes on without a capture
        tell(f"nothing is recorded by process {os.getpid()}: {type(error).__name__}: {error}")


_ACTIVE: dict[str, AbstractContextManager[None]] = {}
