"""`python -m distbench`, and the entry point of the `distbench` command.

Signals are seen to before anything else is loaded, which takes longer than a hand on a keyboard. A rank that torchrun
started ends by them without a word, as torchrun expects.
"""

from __future__ import annotations

import os
import sys

from distbench.signals import Interrupted, leave, leave_by_signals, raise_signals

CRASHED = 70
"""The exit code of an error of the bench itself: EX_SOFTWARE of sysexits.h."""


def main() -> None:
    """Run the command line and exit with its code."""
    started_by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if not started_by_torchrun:
        leave_by_signals()
    try:
        from distbench.cli import main as run_command  # noqa: PLC0415 - see above

        if not started_by_torchrun:
            raise_signals()
        code = run_command()
    except Interrupted as error:
        leave(error)
    except Exception:  # noqa: BLE001 - Python's own exit code, 1, would say that a result is wrong
        sys.excepthook(*sys.exc_info())
        code = CRASHED
    sys.exit(code)


if __name__ == "__main__":
    main()
