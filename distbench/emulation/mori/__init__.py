"""A stand-in for the package `mori` (amd-mori), over `torch.distributed`: docs/mori.md says what it imitates.

`mori.shmem` and `mori.ops` have the names and signatures of the wheel. `assume` chooses the release it behaves like.
"""

from __future__ import annotations

from distbench.emulation.mori import ops, shmem
from distbench.emulation.mori.habits import assume

__version__ = "1.2.4+emulated"
__all__ = ["__version__", "assume", "ops", "shmem"]
