"""Experts of SGLang: its Triton `fused_experts`, called with the ids that its expert parallelism makes.

Rounding points are those of SGLang 0.5.13, by its text: module fused_moe of its triton_utils,
activation.cuh of its compiled kernels, and `moe_sum_reduce` of sgl_kernel, which adds in float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec
from torch import Tensor

from distbench.case.plugins import Plugin
from distbench.case.spec import Case
from distbench.errors import Unsupported
from distbench.experts.base import ExpertInput, Experts, ExpertsContext, ExpertWeights
from distbench.experts.formulas import formula_of
from distbench.experts.guest import check_guest_layer, live_ids, tile_name
from distbench.experts.quantized_weights import QuantizedWeights
from distbench.experts.reference import local_rows
from distbench.experts.roundings import Roundings
from distbench.experts.selection.choice import KernelChoice
from distbench.utils.text import one_line
from distbench.workload.exact_plan import BLOCK
from distbench.workload.quantize import dequantize

_COMPILED_SUM_ROWS = 32
"""Rows up to which the sum of a row's routes is torch's compiled one, and above them a kernel of sgl_kernel."""


class _Package(NamedTuple):
    """Names of SGLang that the experts use."""

    call: Any
    tiles: Any
    version: str


class SglangExperts(Experts):
    """SGLang's `fused_experts_impl`, with -1 as the id of experts elsewhere and of rows that are not live.

    It takes bf16 rows, and quantises them itself for fp8 products. So fp8 rows are given to it as bf16: their e4m3
    values come out again, and a scale that is no power of two is off by the rounding of its largest value to bf16.
    """

    def __init__(self, case: Case) -> None:
        """Import SGLang.

        Raises:
            Unsupported: it is not installed, is a release with another interface, or does not compute the layer.
        """
        check_guest_layer(case, "sglang-triton")
        self._case = case
        self._fp8 = case.dispatch_dtype == "fp8"
        self._sglang = _package()
        self._weights = QuantizedWeights()
        self._local: Tensor | None = None

    def selection(self, rows: int) -> KernelChoice:
        """See `Experts.selection`."""
        up, (down, _) = self._tiles(rows)
        names = [tile_name(up)] + ([] if down is None else [f"then {tile_name(down)}"])
        names += ["compiled sum"] if rows <= _COMPILED_SUM_ROWS and self._case.topk_slots > 2 else []  # noqa: PLR2004
        return KernelChoice.named(rows, f"sglang fused_experts {' '.join(names)}")

    def roundings(self, choice: KernelChoice) -> Roundings:  # noqa: ARG002 - those of a kernel hold for any rows
        """See `Experts.roundings`."""
        plain = Roundings(bf16_products=True, formula=formula_of(self._case))
        if not self._fp8:
            return plain
        return msgspec.structs.replace(plain, weights="e4m3fn", intermediate="e4m3fn", scales="maximum")

    def about(self) -> dict[str, Any]:
        """See `Experts.about`."""
        return {"sglang": {"version": self._sglang.version}}

    def __call__(self, given: ExpertInput, weights: ExpertWeights) -> Tensor:
        """See `Experts.__call__`."""
        if not given.rows:
            return weights.w2.new_empty(0, weights.w2.shape[1])
        w1, w2, quantised = weights.w1, weights.w2, {}
        if self._fp8:
            held = self._weights.of(w1, w2)
            w1, w2 = held.w1, held.w2
            quantised = {"use_fp8_w8a8": True, "w1_scale": held.joined_scales1, "w2_scale": held.scales2}
            quantised["block_shape"] = [BLOCK, BLOCK]
        rows: Tensor = self._sglang.call(
            hidden_states=dequantize(given.hidden, given.scales).bfloat16() if self._fp8 else given.hidden,
            w1=w1,
            w2=w2,
            topk_weights=given.weights,
            topk_ids=self._local_ids(given, weights.mask),
            inplace=False,
            activation="silu",
            filter_expert=True,
            **quantised,
        )
        return rows

    def _local_ids(self, given: ExpertInput, mask: Tensor) -> Tensor:
        """Return the local numbers of experts, int32 [M, k]."""
        if self._local is None:
            self._local = local_rows(mask).int()
        return self._local.take(live_ids(given, len(mask), absent=len(mask)).long())

    def _tiles(self, rows: int) -> Any:
        case = self._case
        local, hidden, columns = case.experts_per_rank, case.hidden_size, case.intermediate_size
        return self._sglang.tiles(
            (local, 2 * columns, hidden),
            (local, hidden, columns),
            case.topk_slots,
            "fp8_w8a8" if self._fp8 else None,
            rows,
            block_shape=[BLOCK, BLOCK] if self._fp8 else None,
            return_down_config=True,
        )


def _package() -> _Package:
    try:
        import sglang

        _give_settings()
        from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe, fused_moe_triton_config

        tiles = fused_moe_triton_config.try_get_optimal_moe_config
        return _Package(fused_moe.fused_experts_impl, tiles, str(sglang.__version__))
    except (ImportError, AttributeError, RuntimeError) as error:  # later releases refuse the settings
        message = (
            f"experts sglang-triton: {one_line(error)}; install an sglang from 0.5.12 to 0.5.14 with its sgl_kernel "
            "beside its torch (docs/plugins.md)"
        )
        raise Unsupported(message) from error


def _give_settings() -> None:
    """Give SGLang the settings of a server without a model, which its experts ask for, unless it has some."""
    from sglang.srt import server_args

    try:
        server_args.get_global_server_args()
    except ValueError:
        server_args.set_global_server_args_for_scheduler(server_args.ServerArgs(model_path="dummy"))


def make(context: ExpertsContext) -> SglangExperts:
    """Return the experts of a case."""
    return SglangExperts(context.case)


PLUGIN = Plugin(make=make, name="sglang-triton", devices=("cuda",), graphs=True)
