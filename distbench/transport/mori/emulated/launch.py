"""Launch geometry that the package would choose; it changes no value here."""

from __future__ import annotations

import os

from distbench.transport.mori.emulated.buffers import EpDispatchCombineConfig
from distbench.transport.mori.emulated.routing import EpDispatchCombineKernelType

Geometry = tuple[int, int, int]
"""block_num, rdma_block_num, warp_per_block; -1 and 0 mean unset."""

_MODES = ("MANUAL", "AUTO")
_AUTO: dict[EpDispatchCombineKernelType, Geometry] = {
    EpDispatchCombineKernelType.InterNodeV1: (96, 64, 8),
    EpDispatchCombineKernelType.InterNodeV1LL: (256, 128, 8),
}
_AUTO_OTHERS = (128, 0, 16)
_INTRANODE_DISPATCH = (256, 0, 16)


class Launches:
    """Effect of MORI_EP_LAUNCH_CONFIG_MODE on the geometries that calls give, where no table has a rule."""

    def __init__(self, config: EpDispatchCombineConfig) -> None:
        """Read the mode.

        Raises:
            ValueError: the mode is neither MANUAL nor AUTO.
        """
        self.mode = os.environ.get("MORI_EP_LAUNCH_CONFIG_MODE", "MANUAL")
        if self.mode not in _MODES:
            message = f"invalid MORI_EP_LAUNCH_CONFIG_MODE, must be {list(_MODES)}, got '{self.mode}'"
            raise ValueError(message)
        kernel = config.kernel_type
        self._automatic = _AUTO.get(kernel, _AUTO_OTHERS) if self.mode == "AUTO" else (0, 0, 0)
        self._configured = (config.block_num, config.rdma_block_num, config.warp_num_per_block)
        intranode = kernel is EpDispatchCombineKernelType.IntraNode
        self._dispatched = _INTRANODE_DISPATCH if intranode else (0, 0, 0)

    def asked(self, geometry: Geometry) -> Geometry:
        """Return the result of `get_launch_config`: AUTO's own numbers take precedence over the call's."""
        block_num, rdma_block_num, warp_per_block = (
            own or given for own, given in zip(self._automatic, geometry, strict=True)
        )
        return block_num, rdma_block_num, warp_per_block

    def taken(self, geometry: Geometry, *, dispatch: bool) -> Geometry:
        """Return the geometry of a call: unset numbers come from the kernel, else from the configuration."""
        defaults = self._dispatched if dispatch else (0, 0, 0)
        block_num, rdma_block_num, warp_per_block = (
            given if given > 0 else default or configured
            for given, default, configured in zip(self.asked(geometry), defaults, self._configured, strict=True)
        )
        return block_num, rdma_block_num, warp_per_block
