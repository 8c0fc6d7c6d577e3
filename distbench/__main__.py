"""`python -m distbench`, and the entry point of the `distbench` command.

Signal handlers are installed before any other import, since imports take longer than a keystroke. A rank that torchrun
started exits on signals without a message, as torchrun expects. It leaves without the interpreter's clean-up, as ranks
of the fork server do: threads of gloo that are still there abort it now and then, and fail a job that passed.
"""

from __future__ import annotations

import contextlib
import os
import sys

from distbench.utils.signals import Interrupted, leave, leave_by_signals, raise_signals

CRASHED = 70
"""The exit code of an error of the bench itself: EX_SOFTWARE of sysexits.h."""


def main() -> None:
    """Run the command line and exit with its code."""
    started_by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if not started_by_torchrun:
        leave_by_signals()
    try:
        from distbench.cli.main import main as run_command  # noqa: PLC0415 - see above

        if not started_by_torchrun:
            raise_signals()
        code = run_command()
    except Interrupted as error:
        leave(error)
    except Exception:  # noqa: BLE001 - Python's own exit code, 1, would say that a result is wrong
        sys.excepthook(*sys.exc_info())
        code = CRASHED
    if started_by_torchrun:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
