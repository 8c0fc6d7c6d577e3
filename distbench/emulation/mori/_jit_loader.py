"""The kernels of a process, with the wheel's names: loaded once, and told of the shmem world only then."""

from __future__ import annotations

from distbench.emulation.mori import shmem
from distbench.emulation.mori.habits import trap


class HipModule:
    """The kernels of one file; `states` is the world that they know."""

    states: shmem.World | None = None

    def launch(self) -> None:
        """Run a kernel that finds its peers by what the module knows of the world."""
        if self.states is not shmem.world():
            trap("memory access fault: the kernel reads states of a shmem world that was finalised")


_loaded_modules: dict[str, HipModule] = {}


def load_hip_module(hip_name: str, init_shmem: bool = True) -> HipModule:  # noqa: FBT001, FBT002 - the wheel's
    """Return the module of this name, a new one told of the world; one that was loaded before as it is."""
    if hip_name not in _loaded_modules:
        module = HipModule()
        if init_shmem:
            module.states = shmem.world()
        _loaded_modules[hip_name] = module
    return _loaded_modules[hip_name]
