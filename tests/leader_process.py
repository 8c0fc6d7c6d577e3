"""Node 0's leader in its own process: prints its port, then its resident bytes for each line on standard input.

Exits on stdin EOF; the last printed line has the number of refused peers.
"""

from __future__ import annotations

import os
import re
import socket
import sys
from pathlib import Path

from distbench.launcher.job import NodeLayout
from distbench.launcher.nodes.leader import Leader


def resident_bytes() -> int:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def main(log: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    layout = NodeLayout(nodes=2, node=0, nproc=1, host="127.0.0.1", port=port, launch=0)
    leader = Leader(layout, 60.0, os.environ["DISTBENCH_SECRET"].encode(), Path(log))
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()
    for _ in sys.stdin:
        sys.stdout.write(f"{resident_bytes()} {len(leader.lost())} {leader.refused or '-'}\n")
        sys.stdout.flush()
    leader.close(0)
    sys.stdout.write(f"{leader.strangers}\n")


if __name__ == "__main__":
    main(sys.argv[1])
