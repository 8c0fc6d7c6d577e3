"""A real Slurm on emulated hosts: munged, slurmctld on host0, and a slurmd on each host."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

from tests.end_to_end.launches import wait_until
from tests.hosts import ROOT, Hosts, cannot

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "scontrol")
_CONFIGURATION = """
ClusterName=emulated
SlurmctldHost=host0({address})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/linear
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=20
SlurmdTimeout={node_timeout}
JobRequeue=1
SchedulerParameters=sched_interval=1,sched_min_interval=0
NodeName=host[0-{last}] CPUs=1 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=20 PreemptMode=REQUEUE
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""


class Slurm:
    """The daemons; they end with the hosts."""

    def __init__(self, net: Hosts, folder: Path, *, node_timeout: int = 300) -> None:
        """Start the daemons; Slurm marks a node as failed after `node_timeout` silent seconds."""
        absent = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
        if absent:
            cannot(f"no {', '.join(absent)}: install slurmctld, slurmd, slurm-client and munge")
        self._net = net
        self._folder = folder
        self._file = folder / "slurm.conf"
        text = _CONFIGURATION.format(
            address=net.address(0), folder=folder, last=net.count - 1, node_timeout=node_timeout
        )
        self._file.write_text(text)
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # set explicitly: there is nothing to detect
        for name in ("state", *(f"spool-host{number}" for number in range(net.count))):
            (folder / name).mkdir()
        (folder / "key").write_bytes(secrets.token_bytes(64))
        (folder / "key").chmod(0o400)
        self._start()

    def _start(self) -> None:
        folder, net = self._folder, self._net
        munge = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={folder}/key"]
        names = ("pid", "log", "seed")
        munge += [f"--{name}-file={folder}/munge.{name}" for name in names]
        net.start_command(0, munge, PATH=_path())
        assert wait_until((folder / "munge.socket").exists, 10)
        net.start_command(0, ["slurmctld", "-D", "-c", "-f", str(self._file)], PATH=_path())
        for number in range(net.count):
            command = ["slurmd", "-D", "-c", "-N", f"host{number}", "-f", str(self._file)]
            net.start_command(number, command, PATH=_path())
        assert wait_until(lambda: self.ask("sinfo", "-h", "-o", "%T %D").strip() == f"idle {net.count}", 40), self.ask(
            "sinfo", "-N", "-l"
        ) + self.ask("scontrol", "show", "nodes")

    def ask(self, *command: str, **environ: str) -> str:
        """Run a command of Slurm on host0 and return its output."""
        environment = os.environ | {"PATH": _path(), "SLURM_CONF": str(self._file)} | environ
        done = subprocess.run(
            self._net.on(0, list(command)), capture_output=True, text=True, check=False, env=environment, timeout=60
        )
        return done.stdout + done.stderr

    def submit(self, *arguments: str, **environ: str) -> str:
        """Submit launch/slurm.sbatch and return the job's number."""
        command = self._folder / "bin" / "distbench"
        command.parent.mkdir(exist_ok=True)
        command.write_text(f'#!/bin/sh\nexec {sys.executable} -m distbench "$@"\n')
        command.chmod(0o755)
        environ = {"VENV": str(self._folder), "PYTHONPATH": str(ROOT), "OUT": str(self._folder / "out")} | environ
        log = f"--output={self._folder}/job-%j.log"
        count = str(self._net.count)
        told = self.ask("sbatch", "--parsable", "--nodes", count, log, f"--chdir={ROOT}", *arguments, **environ)
        number = told.splitlines()[-1]
        assert number.isdigit(), told
        return number

    def state(self, number: str) -> str:
        """State of a job, as Slurm names it."""
        words = self.ask("scontrol", "show", "job", number).split()
        return next((word.removeprefix("JobState=") for word in words if word.startswith("JobState=")), "")

    def exit_code(self, number: str) -> int:
        """Exit code of a job."""
        words = self.ask("scontrol", "show", "job", number).split()
        code = next(word.removeprefix("ExitCode=") for word in words if word.startswith("ExitCode="))
        return int(code.split(":")[0])

    def log(self, number: str) -> str:
        """Output of a job."""
        path = self._folder / f"job-{number}.log"
        return path.read_text() if path.exists() else ""


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"
