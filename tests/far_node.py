"""Fake ssh: runs a command in its own session, which gets no signal from here, and forwards standard input."""

from __future__ import annotations

import os
import subprocess
import sys
import threading


def main() -> int:
    """Start the command, forward standard input, and exit with its code."""
    far = subprocess.Popen(sys.argv[2:], stdin=subprocess.PIPE, start_new_session=True)

    def feed() -> None:
        while (block := os.read(0, 4096)) and far.stdin is not None:
            far.stdin.write(block)
            far.stdin.flush()
        if far.stdin is not None:
            far.stdin.close()

    threading.Thread(target=feed, daemon=True).start()
    return far.wait()


if __name__ == "__main__":
    sys.exit(main())
