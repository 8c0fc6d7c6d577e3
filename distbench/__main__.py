"""`python -m distbench`, and the entry point of the `distbench` command.

Signals are seen to before anything else is loaded, which takes longer than a hand on a keyboard. A rank that torchrun
started ends by them without a word, as torchrun expects.
"""

from __future__ import annotations

import os
import sys

from distbench.signals import Interrupted, raise_signals


def main() -> None:
    """Run the command line and exit with its code."""
    try:
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            raise_signals()
        from distbench.cli import main as run_command  # noqa: PLC0415 - see above

        code = run_command()
    except Interrupted as error:
        sys.stderr.write(f"distbench: INTERRUPTED: {error}, before anything had begun\n")
        code = error.exit_code
    sys.exit(code)


if __name__ == "__main__":
    main()
