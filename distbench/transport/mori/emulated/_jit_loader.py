"""The kernels of a process, under the wheel's names: loaded once, with the shmem world of that moment."""

from __future__ import annotations

from distbench.transport.mori.emulated import shmem
from distbench.transport.mori.emulated.quirks import trap


class HipModule:
    """The kernels of one file; `states` is the world they were loaded in."""

    states: shmem.World | None = None

    def launch(self) -> None:
        """Run a kernel that finds its peers through the module's world."""
        if self.states is not shmem.world():
            trap("memory access fault: the kernel reads states of a shmem world that was finalised")


_loaded_modules: dict[str, HipModule] = {}


def load_hip_module(hip_name: str, init_shmem: bool = True) -> HipModule:  # noqa: FBT001, FBT002 - the wheel's
    """Return the module of this name: a new one with the current world, or the one loaded before, unchanged."""
    if hip_name not in _loaded_modules:
        module = HipModule()
        if init_shmem:
            module.states = shmem.world()
        _loaded_modules[hip_name] = module
    return _loaded_modules[hip_name]
