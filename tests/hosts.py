"""Emulated hosts on one machine: network namespaces with their own host names.

A host has two network interfaces, eth0 and eth1, each on a switch of its own.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).parents[1]
PORT = 29500
LONG = os.environ.get("DISTBENCH_CLUSTER") == "1"
NETWORKS = ("10.77.0", "10.78.0")
_NAMES = Path("/etc/netns")


def missing() -> str:
    """Reason why hosts cannot be emulated here, or an empty text."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return "no ip or unshare: install iproute2 and util-linux"
    probe = f"distbench-{uuid.uuid4().hex[:6]}"
    done = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)  # noqa: S607
    if done.returncode:
        return f"no network namespaces here: {done.stderr.strip()}"
    _ip("netns", "del", probe)
    return ""


def cannot(why: str) -> NoReturn:
    """Skip the test, or fail it if DISTBENCH_CLUSTER requires all of them."""
    if LONG:
        pytest.fail(why)
    pytest.skip(why)


class Hosts:
    """`count` hosts, named host0, host1, …, at 10.77.0.1 and on; on the other network at 10.78.0.1 and on.

    `meeting` is the number of the network of the rendezvous address.
    """

    def __init__(self, count: int, out: Path) -> None:
        self._tag = f"dbt{uuid.uuid4().hex[:5]}"
        self.folder = out
        self.count = count
        self.meeting = 0
        self.secret = secrets.token_hex(32)
        self.started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Hosts:  # noqa: PYI034 - Self comes with Python 3.11
        switch = self._space("switch")
        _ip("netns", "add", switch)
        for network in range(len(NETWORKS)):
            _ip("-n", switch, "link", "add", f"br{network}", "type", "bridge")
            _ip("-n", switch, "link", "set", f"br{network}", "up")
        for number in range(self.count):
            self._names(number)
            _ip("netns", "add", self._space(number))
            for network in range(len(NETWORKS)):
                self._plug_in(number, network)
            _ip("-n", self._space(number), "link", "set", "lo", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.started:
            process.kill()
            process.wait()
        for name in ("switch", *range(self.count)):
            for pid in self.processes(name):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
            _ip("netns", "del", self._space(name))
            shutil.rmtree(_NAMES / self._space(name), ignore_errors=True)

    def _plug_in(self, number: int, network: int) -> None:
        switch, space = self._space("switch"), self._space(number)
        port, card = f"port{number}-{network}", f"eth{network}"
        _ip("-n", switch, "link", "add", port, "type", "veth", "peer", "name", card, "netns", space)
        _ip("-n", switch, "link", "set", port, "master", f"br{network}", "up")
        _ip("-n", space, "address", "add", f"{self.address(number, network)}/24", "dev", card)
        _ip("-n", space, "link", "set", card, "up")

    def _names(self, number: int) -> None:
        """Make the names of all hosts resolve on this one; `ip netns exec` mounts the file over /etc/hosts."""
        folder = _NAMES / self._space(number)
        folder.mkdir(parents=True)
        lines = [f"{self.address(other)} host{other}" for other in range(self.count)]
        (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))

    def start(self, number: int, *arguments: str | Path, **environ: str) -> subprocess.Popen[bytes]:
        """Start `distbench` on a host, with node 0 on host0; its output goes to `log(number)`."""
        place = ("--nnodes", str(self.count), "--node-rank", str(number))
        meeting = ("--rdzv-endpoint", f"{self.address(0, self.meeting)}:{PORT}")
        command = [sys.executable, "-m", "distbench", *map(str, arguments), *place, *meeting]
        return self.start_command(number, command, **environ)

    def start_command(self, number: int, command: list[str], **environ: str) -> subprocess.Popen[bytes]:
        """Start any command on a host."""
        with self.log(number).open("ab") as log:
            process = subprocess.Popen(
                self.on(number, command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": str(ROOT), "DISTBENCH_SECRET": self.secret} | environ,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def on(self, number: int, command: list[str]) -> list[str]:
        """Command that runs `command` on a host."""
        enter = ["ip", "netns", "exec", self._space(number), "unshare", "--uts", "sh", "-c"]
        return [*enter, 'hostname "$0" && exec "$@"', f"host{number}", *command]

    def cut(self, number: int) -> None:
        """Pull a host's cables: packets are lost without an error at either end."""
        for network in range(len(NETWORKS)):
            _ip("-n", self._space("switch"), "link", "set", f"port{number}-{network}", "down")

    def part(self, number: int, other: int) -> None:
        """Block packets between two hosts; both still reach all others."""
        for one, far in ((number, other), (other, number)):
            for network in range(len(NETWORKS)):
                _ip("-n", self._space(one), "route", "add", "blackhole", self.address(far, network))

    def slow(self, number: int) -> None:
        """Degrade a host's link: delay and loss if the kernel supports them, else less bandwidth."""
        netem, tbf = "netem delay 20ms 5ms loss 1%", "tbf rate 1mbit burst 4kb latency 400ms"
        for network in range(len(NETWORKS)):
            link = ("-n", self._space(number), "qdisc", "add", "dev", f"eth{network}", "root")
            if not any(_tc(*link, *how.split()) for how in (netem, tbf)):
                cannot("this kernel has neither netem nor tbf to slow a link")

    def processes(self, number: int | str) -> list[int]:
        """Process ids on a host."""
        command = ["ip", "netns", "pids", self._space(number)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return [int(pid) for pid in done.stdout.split()]

    def log(self, number: int) -> Path:
        return self.folder / f"host{number}.log"

    def address(self, number: int, network: int = 0) -> str:
        return f"{NETWORKS[network]}.{number + 1}"

    def _space(self, name: int | str) -> str:
        return f"{self._tag}-{name}"


@contextlib.contextmanager
def hosts(count: int, out: Path) -> Iterator[Hosts]:
    """Yield hosts; without support for them the test ends as in `cannot`."""
    why = missing()
    if why:
        cannot(why)
    with Hosts(count, out) as made:
        yield made


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)  # noqa: S607


def _tc(*arguments: str) -> bool:
    return subprocess.run(["tc", *arguments], check=False, capture_output=True).returncode == 0  # noqa: S607
