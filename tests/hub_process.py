"""Node 0's hub in its own process: prints its port, then its resident bytes for each line on standard input.

Exits on stdin EOF; the last printed line has the number of refused peers.
"""

from __future__ import annotations

import os
import re
import socket
import sys
from pathlib import Path

from distbench.launcher.job import Spread
from distbench.launcher.nodes.leader import Hub


def resident_bytes() -> int:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def main(log: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    spread = Spread(nodes=2, node=0, nproc=1, host="127.0.0.1", port=port, launch=0)
    hub = Hub(spread, 60.0, os.environ["DISTBENCH_SECRET"].encode(), Path(log))
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()
    for _ in sys.stdin:
        sys.stdout.write(f"{resident_bytes()} {len(hub.lost())} {hub.refused or '-'}\n")
        sys.stdout.flush()
    hub.close(0)
    sys.stdout.write(f"{hub.strangers}\n")


if __name__ == "__main__":
    main(sys.argv[1])
