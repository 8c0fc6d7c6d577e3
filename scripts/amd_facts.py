"""Facts about an AMD node for remote diagnosis: commands to run, files to read, variables to keep.

Only the standard library, and nothing of distbench: the node may lack everything that distbench needs.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

TOOL_SECONDS = 60
_MOST_BYTES = 2 << 20
_LAST_LINES = 400

# Name of a file in the archive -> command whose output it holds; the file names a tool that is missing.
TOOLS: dict[str, list[str]] = {
    "system/uname": ["uname", "-a"],
    "system/lscpu": ["lscpu"],
    "system/numa": ["numactl", "--hardware"],
    "system/limits": ["sh", "-c", "ulimit -a; echo; ulimit -H -a"],
    "system/identity": ["id"],
    "system/disks": ["df", "-h", "/dev/shm", "/tmp", ".", os.path.expanduser("~")],  # noqa: S108, PTH111 - their sizes
    "system/dmesg-before": ["dmesg", "--ctime"],
    "system/sysctl": ["sysctl", "kernel.numa_balancing", "kernel.yama.ptrace_scope", "vm.overcommit_memory"],
    "system/lspci": ["lspci", "-nn"],
    "system/processes": ["ps", "-eo", "pid,user,etime,rss,comm"],
    "rocm/rocminfo": ["rocminfo"],
    "rocm/rocm-smi": ["rocm-smi"],
    "rocm/rocm-smi-all": ["rocm-smi", "-a"],
    "rocm/rocm-smi-topology": ["rocm-smi", "--showtopo"],
    "rocm/rocm-smi-processes": ["rocm-smi", "--showpids"],
    "rocm/amd-smi-version": ["amd-smi", "version"],
    "rocm/amd-smi-static": ["amd-smi", "static"],
    "rocm/amd-smi-topology": ["amd-smi", "topology"],
    "rocm/hipcc": ["hipcc", "--version"],
    "rocm/hipconfig": ["hipconfig", "--full"],
    "rocm/devices": ["ls", "-l", "/dev/kfd", "/dev/dri", "/dev/infiniband"],
    "network/addresses": ["ip", "-brief", "address"],
    "network/routes": ["ip", "route"],
    "network/rdma-links": ["rdma", "link"],
    "network/ibv-devices": ["ibv_devinfo"],
    "code/commit": ["git", "log", "-1", "--format=%H %cI %s"],
    "code/changes": ["git", "status", "--short"],
}
# State that a run changes: recorded again at the end.
TOOLS_AFTER: dict[str, list[str]] = {
    "system/dmesg-after": ["dmesg", "--ctime"],
    "system/processes-after": ["ps", "-eo", "pid,user,etime,rss,comm"],
    "system/shared-memory-after": ["ls", "-la", "/dev/shm"],  # noqa: S108 - what was left behind
    "rocm/rocm-smi-after": ["rocm-smi"],
    "rocm/rocm-smi-processes-after": ["rocm-smi", "--showpids"],
}
FILES = (
    *("/etc/os-release", "/proc/cmdline", "/proc/meminfo", "/proc/self/status", "/proc/self/cgroup", "/.dockerenv"),
    *("/run/.containerenv", "/sys/module/amdgpu/version", "/sys/fs/cgroup/memory.max", "/proc/mounts"),
    *("/proc/sys/kernel/shmmax", "/proc/driver/nvidia/version"),
)
GLOBS = (
    ("/opt", "rocm*/.info/version*"),
    ("/sys/class/kfd/kfd/topology/nodes", "*/properties"),
    ("/sys/class/kfd/kfd/topology/nodes", "*/io_links/*/properties"),
    ("/sys/class/infiniband", "*/ports/*/state"),
    ("/sys/class/infiniband", "*/ports/*/rate"),
    ("/sys/class/infiniband", "*/fw_ver"),
)
KEPT_VARIABLES = re.compile(
    r"MORI|AITER|^(?:ATOM|VLLM_ROCM|SGLANG|NCCL|RCCL|GLOO|TORCH|PYTORCH|OMP|H(?:IP|SA)|ROCR|ROCM|AMD|GPU|CUDA|FLYDSL|CK)_"
    r"|^(?:CU_NUM|PATH|LD_LIBRARY_PATH|LD_PRELOAD|PYTHONPATH|VIRTUAL_ENV|CONDA_PREFIX|CC|CXX|TMPDIR|HOME|SHELL|LANG)$"
    r"|^(?:SLURM|OMPI|PMI|KUBERNETES|DISTBENCH|GPTOSS|MASTER|RANK|WORLD|LOCAL|TRITON)"
)
SECRET_NAMES = re.compile(
    r"SECRET|PASSW|CREDENTIAL|PRIVATE|API_?KEY|ACCESS_?KEY|AUTH|(?:^|_)TOKEN$|COOKIE|SIGNATURE", re.IGNORECASE
)
_USER_IN_URL = re.compile(r"(?<=://)[^\s/@:]+:[^\s/@]+(?=@)")
_SHORTEST_SECRET = 6
LEFT_OUT = "(left out)"


def variables(environ: Mapping[str, str]) -> str:
    """Text of the environment: values of relevant variables, only names of all others."""
    lines = []
    for name in sorted(environ):
        shown = KEPT_VARIABLES.search(name) and not SECRET_NAMES.search(name)
        lines.append(f"{name}={environ[name]}" if shown else f"{name} {LEFT_OUT}")
    return "\n".join(lines) + "\n"


def redacted(text: str, environ: Mapping[str, str]) -> str:
    """Text without users and passwords in addresses, and without values of variables named like secrets."""
    for name, value in environ.items():
        if SECRET_NAMES.search(name) and len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, LEFT_OUT)
    return _USER_IN_URL.sub(LEFT_OUT, text)


def output_of(command: list[str]) -> str:
    """Last lines of a small tool's output with its exit code, or the reason why it did not run."""
    told = f"$ {' '.join(command)}\n"
    try:
        done = subprocess.run(command, capture_output=True, timeout=TOOL_SECONDS, check=False, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return f"{told}no end within {TOOL_SECONDS} s\n"
    except OSError as error:
        return f"{told}{error.strerror}\n"
    text = (done.stdout + done.stderr)[-_MOST_BYTES:].decode(errors="replace")
    if command[0] == "dmesg":
        text = "\n".join(text.splitlines()[-_LAST_LINES:])
    return f"{told}{text}\nexit code {done.returncode}\n"


def files() -> dict[str, str]:
    """Texts of the node's files by path; the error for an unreadable file; missing files are left out."""
    paths = [Path(path) for path in FILES]
    paths += [path for folder, pattern in GLOBS for path in sorted(Path(folder).glob(pattern))]
    return {str(path): _read(path) for path in paths if path.exists()}


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_MOST_BYTES).decode(errors="replace")
    except OSError as error:
        return f"cannot be read: {error.strerror}\n"


def identity() -> str:
    """Host, interpreter and working folder of this process."""
    return f"host {socket.gethostname()}\npython {sys.version}\nexecutable {sys.executable}\nfolder {Path.cwd()}\n"


# Run by the environment's own Python: each import fails in its own process, with its whole traceback.
IMPORT = """
import faulthandler, importlib, importlib.util, sys, time
faulthandler.enable()
name, start = sys.argv[1], time.monotonic()
module = importlib.import_module(name)
print(name, getattr(module, '__version__', '(no version)'), getattr(module, '__file__', ''))
print('imported in %.1f s' % (time.monotonic() - start))
if name == 'torch':
    print('hip', module.version.hip, 'cuda', module.version.cuda, 'devices', module.cuda.device_count())
    for index in range(module.cuda.device_count()):
        print(index, module.cuda.get_device_properties(index))
"""
MODULES = ("torch", "mori", "mori.ops", "mori.shmem", "aiter", "aiter.fused_moe", "triton", "sglang.version")
AITER_FOLDER = """
import importlib.util
spec = importlib.util.find_spec('aiter')
print(*(spec.submodule_search_locations if spec else ()), sep='\\n')
"""
# Shared libraries of the vendors' packages that the loader does not find; nothing is imported.
LIBRARIES = """
import importlib.util, pathlib, subprocess
for name in ('mori', 'aiter', 'torch'):
    try:
        spec = importlib.util.find_spec(name)
    except Exception as error:
        print(name, repr(error)); continue
    places = list(spec.submodule_search_locations or []) if spec else []
    print(name, 'is not installed' if spec is None else places)
    for place in places:
        for library in sorted(pathlib.Path(place).rglob('*.so*'))[:200]:
            done = subprocess.run(['ldd', str(library)], capture_output=True, text=True, check=False)
            missing = [line.strip() for line in done.stdout.splitlines() if 'not found' in line]
            if missing or done.returncode:
                print(library, *(missing or [done.stderr.strip()]), sep='\\n    ')
"""


def build_folders(python: str) -> list[Path]:
    """Build folders of aiter and MoRI: named by a variable, beside the package, or in the home folder."""
    home, told = Path.home(), os.environ.get("AITER_JIT_DIR")
    folders = [Path(told)] if told else [home / ".aiter"]
    folders.append(Path(os.environ.get("MORI_JIT_CACHE_DIR") or home / ".mori" / "jit"))
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run([python, "-c", AITER_FOLDER], capture_output=True, text=True, timeout=60, check=False)
        folders += [Path(line) / "jit" for line in done.stdout.split("\n") if line.startswith("/")]
    return folders
