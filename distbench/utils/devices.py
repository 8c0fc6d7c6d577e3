"""Accelerators of this node: their number, the ranks that take them, and their state during a timing.

torch calls them `cuda` on NVIDIA and on ROCm alike. Facts that only one vendor provides are queried here, and optional.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from distbench.errors import Unsupported
from distbench.utils.text import counted
from distbench.utils.variables import whole

_NODES = ("/dev/nvidia[0-9]*", "/dev/kfd")
_KFD_NODES = Path("/sys/class/kfd/kfd/topology/nodes")
_UNITS = "CU_NUM"
_UNKNOWN_UUID = f"GPU-{0:016x}"
_SMI_SECONDS, _TORCH_SECONDS = 10, 60
_HOT_CELSIUS = 85
_SLOW_SHARE = 0.9


class DeviceState(msgspec.Struct, frozen=True, kw_only=True):
    """State of a device that ran a timing; unknown values are None or empty.

    `clock_mhz` and `max_clock_mhz` are those of the compute units, `processes` counts those that hold memory on it.
    """

    name: str
    clock_mhz: int | None = None
    max_clock_mhz: int | None = None
    power_state: str = ""
    power_watts: float | None = None
    celsius: int | None = None
    throttled: bool | None = None
    processes: int | None = None

    def doubts(self) -> list[str]:
        """Reasons to doubt a time taken on this device."""
        found = []
        if self.clock_mhz is not None and self.max_clock_mhz and self.clock_mhz < _SLOW_SHARE * self.max_clock_mhz:
            found.append(f"its clock is {self.clock_mhz} MHz of {self.max_clock_mhz}")
        if self.throttled:
            found.append("it lowered its clock because of heat or power")
        if self.celsius is not None and self.celsius >= _HOT_CELSIUS:
            found.append(f"it is at {self.celsius} degrees Celsius")
        if self.processes is not None and self.processes > 1:
            found.append(f"{self.processes} processes hold memory on it")
        if self.clock_mhz is None:
            found.append("its clock cannot be read here")
        return found


def count_devices() -> int:
    """Number of devices that torch can use. Loads torch only where the system has a device at all.

    Creates no CUDA context where the vendor's management library is present. Ranks are forked from another process,
    which never calls this.
    """
    if not any(path for pattern in _NODES for path in Path("/").glob(pattern.removeprefix("/"))):
        return 0
    import torch  # noqa: PLC0415 - see above

    return int(torch.cuda.device_count())


def compute_units(environ: Mapping[str, str] = os.environ) -> int | None:
    """Compute units of each ROCm device of this node, as aiter counts them, without waking a device.

    CU_NUM overrides them, as in aiter. None where there is no such device, or where the devices differ.

    Raises:
        InvalidCase: CU_NUM is no whole number.
    """
    told = whole(_UNITS, environ.get(_UNITS, "").strip() or "0")
    if told:
        return told
    counts = {_units_of(node) for node in _KFD_NODES.glob("*/properties")} - {0}
    return counts.pop() if len(counts) == 1 else None


@functools.cache
def architecture() -> str:
    """Architecture of this node's ROCm devices, such as gfx942, without waking a device; empty for none.

    Empty as well where the devices differ.
    """
    found = {_gfx_of(node) for node in _KFD_NODES.glob("*/properties")} - {""}
    return found.pop() if len(found) == 1 else ""


def _units_of(properties: Path) -> int:
    """Compute units of a node of the kernel driver (rocminfo's source, too); 0 for a CPU."""
    with contextlib.suppress(OSError, ValueError, KeyError, ZeroDivisionError):
        values = _read_properties(properties)
        return values["simd_count"] // values["simd_per_cu"]
    return 0


def _gfx_of(properties: Path) -> str:
    """Architecture of a node of the kernel driver, which stores 90402 for gfx942; empty for a CPU."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        version = _read_properties(properties)["gfx_target_version"]
        return f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}" if version else ""
    return ""


def _read_properties(properties: Path) -> dict[str, int]:
    return {name: int(value) for name, value in (line.split() for line in properties.read_text().splitlines())}


def interpreted(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether Triton interprets its kernels on the CPU, by the words that Triton takes for yes."""
    return environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def runs_on_device(asked: str, available: int, local_ranks: int, *, shared: bool = False) -> bool:
    """Whether a case that asks for device `asked` runs on accelerators: `auto` does where each local rank has one.

    `shared`: ranks may share devices, so that one is enough.

    Raises:
        Unsupported: `cuda` was asked for, and there are fewer devices than ranks on this node.

    """
    needed = 1 if shared else local_ranks
    if asked == "cpu" or (asked == "auto" and available < needed):
        return False
    if available < needed:
        message = "device cuda: torch sees no device here, distbench doctor says why; use --device cpu or auto"
        if available:
            message = (
                f"device cuda: {counted(local_ranks, 'rank')} on this node, torch sees {counted(available, 'device')}; "
                "a rank takes a device of its own, since NCCL refuses two on one: start fewer ranks, add "
                "--share-devices, or use --device cpu or auto"
            )
        raise Unsupported(message)
    return True


def devices_to_hold(asked: Sequence[str], local_ranks: int, available: int, *, shared: bool = False) -> tuple[str, ...]:
    """Names of the devices that cases asking for `asked` hold exclusively; none if all run on the CPU.

    Raises:
        Unsupported: as `runs_on_device`.

    """
    if not [one for one in asked if runs_on_device(one, available, local_ranks, shared=shared)]:
        return ()
    return tuple(f"cuda:{name}" for name in _physical(os.environ, available)[:local_ranks])


def _physical(environ: Mapping[str, str], available: int) -> list[str]:
    """Node-wide names of the devices that this process sees, so that two processes name the same device alike.

    The driver's UUID, or a number where it is unknown. On ROCm the runtime's variable applies first, and HIP counts
    within the devices that it leaves visible.
    """
    visible = _nvidia_uuids()
    variables = ["CUDA_VISIBLE_DEVICES"]
    if not visible:
        visible = _rocm_uuids() or [str(number) for number in range(available)]
        hip = "HIP_VISIBLE_DEVICES"
        variables = ["ROCR_VISIBLE_DEVICES", hip if environ.get(hip) else "CUDA_VISIBLE_DEVICES"]
    for variable in variables:
        chosen = [word.strip() for word in environ.get(variable, "").split(",") if word.strip()]
        visible = [_named(word, visible) for word in chosen] or visible
    return visible if len(visible) >= available else [str(number) for number in range(available)]


def _named(word: str, devices: Sequence[str]) -> str:
    """The one of `devices` that a word of such a variable names: by number, UUID, or prefix of a UUID."""
    if word.isdecimal() and int(word) < len(devices):
        return devices[int(word)]
    return next((device for device in devices if device.startswith(word)), word)


def _nvidia_uuids() -> list[str]:
    """UUIDs of this node's NVIDIA devices in order; empty where nvidia-smi fails."""
    return _smi("--query-gpu=uuid")


def _rocm_uuids() -> list[str]:
    """UUIDs of this node's ROCm devices in order; empty where the kernel driver does not list all."""
    nodes = sorted(_KFD_NODES.glob("*/properties"), key=lambda path: int(path.parent.name))
    found = [f"GPU-{_read_properties(node).get('unique_id', 0):016x}" for node in nodes if _units_of(node)]
    return found if len({*found, _UNKNOWN_UUID}) == len(found) + 1 else []


def device_state(index: int) -> DeviceState:
    """Current state of torch's device `index`."""
    import torch  # noqa: PLC0415 - ranks have it

    name = torch.cuda.get_device_name(index)
    if torch.version.hip:
        return _rocm_state(name, index)
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", "")
    fields = "clocks.sm,clocks.max.sm,pstate,power.draw,temperature.gpu,clocks_throttle_reasons.active"
    device = f"GPU-{uuid}"
    values = _smi("--query-gpu=" + fields, device) if uuid else []
    if len(values) != 1:
        return DeviceState(name=name)
    clock, most, power_state, watts, celsius, reasons = (one.strip() for one in values[0].split(","))
    return DeviceState(
        name=name,
        clock_mhz=_number(clock),
        max_clock_mhz=_number(most),
        power_state=power_state,
        power_watts=_number(watts),
        celsius=_number(celsius),
        throttled=_throttled(reasons),
        processes=len(_smi("--query-compute-apps=pid", device)),
    )


def _rocm_state(name: str, index: int) -> DeviceState:
    """Clock in MHz, degrees Celsius or watts by torch's use of amdsmi, where installed; 0 for unknown."""
    import torch  # noqa: PLC0415 - ranks have it

    found = []
    for ask in (torch.cuda.clock_rate, torch.cuda.temperature, torch.cuda.power_draw):
        value = None
        with contextlib.suppress(Exception):  # ModuleNotFoundError, RuntimeError, or an exception of amdsmi
            value = int(ask(index)) or None
        found.append(value)
    clock, celsius, watts = found
    most = getattr(torch.cuda.get_device_properties(index), "clock_rate", 0) // 1000
    return DeviceState(name=name, clock_mhz=clock, max_clock_mhz=most or None, power_watts=watts, celsius=celsius)


def free_device_bytes(held: Sequence[str]) -> int | None:
    """Free bytes on the fullest of the devices `held`, as `devices_to_hold` names them.

    None where unknown. nvidia-smi needs no CUDA context. Elsewhere a separate process asks torch, whose context would
    take part of that memory and stay.
    """
    names = ",".join(one.removeprefix("cuda:") for one in held)
    mebibytes = [_number(line) for line in _smi("--query-gpu=memory.free", names)]
    if mebibytes:
        known = [one for one in mebibytes if one is not None]
        return min(known) << 20 if len(known) == len(held) else None
    asked = f"import torch; print(min(torch.cuda.mem_get_info(one)[0] for one in range({len(held)})))"
    lines = _ask([sys.executable, "-c", asked], _TORCH_SECONDS)
    return _number(lines[-1]) if lines else None


def _smi(query: str, device: str = "") -> list[str]:
    """Lines of an nvidia-smi query about a device, or all; empty without nvidia-smi (ROCm), or where it fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    chosen = [f"--id={device}"] if device else []
    return _ask([program, query, "--format=csv,noheader,nounits", *chosen], _SMI_SECONDS)


def _ask(command: list[str], timeout_s: float) -> list[str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def _number(text: str) -> int | None:
    try:
        return round(float(text))
    except ValueError:
        return None


def _throttled(reasons: str) -> bool | None:
    """Whether NVML's bits name a power cap (0x4, 0x80), heat (0x20, 0x40), or another hardware slowdown (0x8)."""
    try:
        return bool(int(reasons, 16) & 0xEC)
    except ValueError:
        return None
