"""The launch secret: a word that all nodes of a launch share and that never travels."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping

from distbench.errors import InvalidCase
from distbench.utils.text import one_line

VARIABLE = "DISTBENCH_SECRET"
LEAST_BYTES, MOST_BYTES = 16, 4096

_MAKE_ONE = f"make one and give it to all nodes: export {VARIABLE}=$(openssl rand -hex 32)"


def read_secret(host: str, path: str, environ: Mapping[str, str] = os.environ) -> bytes:
    """Secret of a launch with its rendezvous at `host`: from the file at `path`, else from DISTBENCH_SECRET.

    Empty where there is none and `host` is a loopback address, which strangers cannot reach.

    Raises:
        InvalidCase: no secret and other machines could connect, a file that others may read, or too short a secret.

    """
    from distbench.launcher.nodes.interfaces import is_loopback  # noqa: PLC0415 - the parser loads this module

    given = _of_file(path) if path else environ.get(VARIABLE, "").encode("utf-8", "surrogateescape")
    secret = given.strip()
    origin = f"--secret-file {path}" if path else VARIABLE
    if not secret and not path and is_loopback(host):
        return b""
    if not secret:
        message = f"{origin}: no secret, so anyone who reaches {host} could take part; {_MAKE_ONE}"
        raise InvalidCase(message)
    if not LEAST_BYTES <= len(secret) <= MOST_BYTES:
        message = f"{origin}: {len(secret)} bytes; allowed are {LEAST_BYTES} to {MOST_BYTES}; {_MAKE_ONE}"
        raise InvalidCase(message)
    return secret


def _of_file(path: str) -> bytes:
    try:
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:  # noqa: PTH123 - one look
            status = os.fstat(file.fileno())
            content = file.read(MOST_BYTES + 2) if stat.S_ISREG(status.st_mode) else None
    except (OSError, ValueError) as error:
        message = f"--secret-file {path!r:.80}: {one_line(error)}; {_MAKE_ONE}"
        raise InvalidCase(message) from error
    if content is None:
        message = f"--secret-file {path}: not a regular file"
        raise InvalidCase(message)
    if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        message = f"--secret-file {path}: mode {stat.S_IMODE(status.st_mode):04o} lets others read it; chmod 600 {path}"
        raise InvalidCase(message)
    return content
