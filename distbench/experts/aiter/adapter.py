"""Experts by `aiter.fused_moe`, or by its stand-in: the call that production makes, plus checks that aiter omits.

docs/aiter.md lists aiter's failure modes and where each is handled here. The kernel choice is read from aiter: from its
selection function, and from the line that it logs.
"""

from __future__ import annotations

import inspect
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from distbench.case.plugins import Plugin
from distbench.case.spec import Case
from distbench.errors import Unsupported
from distbench.experts import overrides_of
from distbench.experts.aiter.arguments import check_arguments, check_dropped, check_ids, check_live
from distbench.experts.aiter.log import kernel_log
from distbench.experts.aiter.package import (
    PACKAGE,
    STAND_IN,
    AiterPackage,
    check_honoured,
    check_parameters,
    check_settings,
    followed_release,
    load_package,
    tuned_tables,
)
from distbench.experts.aiter.weights import PreparedWeights, prepare_weights
from distbench.experts.base import ExpertInput, Experts, ExpertsContext, ExpertWeights
from distbench.experts.once_per_node import first_on_node
from distbench.experts.selection.choice import KernelChoice
from distbench.experts.selection.heuristics import ACTIVATIONS, ONE_STAGE_BLOCK_M, LayerKey, default_stage
from distbench.experts.selection.kernel_names import DEFAULT_TILE_K, named_split, stage2_mode, tile_k
from distbench.experts.selection.releases import rules_for
from distbench.experts.selection.tuned_table import MISSING
from distbench.experts.shapes import check_aiter_shape
from distbench.utils.amd_arch import fp8_format
from distbench.utils.text import one_line
from distbench.workload.exact_plan import BLOCK
from distbench.workload.quantize import fp8_dtype

_UNFIT = "does not support this GEMM problem"


class AiterExperts(Experts):
    """`Experts` over aiter; see there for the contract."""

    def __init__(self, case: Case, package: AiterPackage) -> None:
        """Take `package` for the layer of `case`.

        Raises:
            InvalidCase: aiter's kernels do not support the shape, or the package would ignore a setting.
            Unsupported: quantisation that cannot be exact on this device.
        """
        self.reuses_output = case.emulate  # aiter allocates each result
        self._case = case
        self.package = package
        self._key = LayerKey(
            num_local_experts=case.experts_per_rank,
            topk=case.topk_slots,
            model_dim=case.hidden_size,
            inter_dim=case.intermediate_size,
            quant=case.dispatch_dtype,
            activation=case.activation,
            doweight_stage1=case.doweight_stage1,
            cu_count=int(package.chip.get_cu_num()),
            gfx=str(package.chip.get_gfx()),
        )
        self._release = package.version if case.emulate else followed_release(case, package)
        self._rules = rules_for(self._release)
        self._known: tuple[tuple[Tensor, Tensor], PreparedWeights] | None = None
        self._choices: dict[int, KernelChoice] = {}
        self._log = kernel_log()
        self._doubts: list[str] = []
        self._tables = tuned_tables(package)
        check_aiter_shape(case.hidden_size, case.intermediate_size, case.dispatch_dtype)
        if not case.emulate:
            check_settings(case)
            check_honoured(case, self._release)
        check_parameters(case, package)
        check_dropped(case)
        if case.dispatch_dtype == "fp8":
            _check_fp8(case, self._key.arch)
        self._activation = getattr(package.root.ActivationType, ACTIVATIONS[case.activation])
        self._payload = fp8_dtype(case.fp8_format) if case.dispatch_dtype == "fp8" else torch.bfloat16

    def selection(self, rows: int) -> KernelChoice:
        """See `Experts.selection`; by aiter's `get_2stage_cfgs`. `about` reports when aiter logged another kernel.

        Raises:
            Unsupported: the function has an argument that is unknown here.
        """
        if rows not in self._choices:
            choice = self._choices[rows] = self._choice(rows)
            doubt = self._log.doubt(choice, self._key)
            self._doubts += [doubt] if doubt else []
        return self._choices[rows]

    def about(self) -> dict[str, Any]:
        """Return the facts that decide the kernels besides the case: version, device, tuned tables, aiter's log lines.

        `rules` is the release whose rules it follows, `doubts` are selections that a log line contradicts. The tables
        are as they were when these experts were made.
        """
        return {
            PACKAGE: {
                "version": self.package.version,
                "rules": self._release,
                "gfx": self._key.arch,
                "cu_count": self._key.cu_count,
                "tuned_tables": msgspec.to_builtins(self._tables),
                "log": self._log.of_layer(self._key),
                "doubts": self._doubts,
            }
        }

    def warm_up(self, weights: ExpertWeights, rows: tuple[int, ...]) -> None:
        """Build the kernels that calls with `rows` rows need: one rank per node builds, the others wait.

        Raises:
            Unsupported: weights on the CPU, or kernels that do not support the layer; or see `selection`.
        """
        self._check_device(weights.w1)
        for count in rows:
            unfit = self.selection(count).unfit(self._key.model_dim, self._key.inter_dim)
            if unfit:
                raise Unsupported(_unfit(count, unfit))
        folder = Path(self.package.core.get_user_jit_dir())
        smallest = {int(self.package.moe.get_padded_M(count)): count for count in sorted(rows, reverse=True)}
        for bucket, count in sorted(smallest.items()):
            first_on_node(folder, self._build_name(bucket), partial(self._empty_call, weights, count))

    def check(self, given: ExpertInput, weights: ExpertWeights) -> None:
        """See `Experts.check`: more valid rows than rows, or ids of no expert, cause memory faults in aiter.

        Raises:
            DistbenchError: as there. Policy `unchecked` passes valid rows on as production does.
        """
        live = int(given.num_local_tokens)
        if self._case.policy != "unchecked":
            check_live(live, given.ids.shape[0])
        check_ids(given.ids[:live], weights.mask.numel())

    def __call__(self, given: ExpertInput, weights: ExpertWeights) -> Tensor:
        """See `Experts.__call__`. Values are not checked: see `check`.

        Raises:
            DistbenchError: types, shapes or layouts from which aiter would compute garbage; names the expected one.
        """
        scale = self.prepared(weights).w1_scale
        check_arguments(given.hidden, given.weights, given.ids, weights.mask, given.scales, scale)
        output: Tensor = self.package.moe.fused_moe(**self.arguments(given, weights))
        return output

    def arguments(self, given: ExpertInput, weights: ExpertWeights) -> dict[str, Any]:
        """Return the arguments of `fused_moe` by aiter's names."""
        layer, root = self.prepared(weights), self.package.root
        return {
            "hidden_states": given.hidden,
            "w1": layer.w1,
            "w2": layer.w2,
            "topk_weight": given.weights,
            "topk_ids": given.ids,
            "expert_mask": weights.mask,
            "activation": self._activation,
            "quant_type": root.QuantType.No if given.scales is None else root.QuantType.per_128x128,
            "doweight_stage1": self._case.doweight_stage1,
            "w1_scale": layer.w1_scale,
            "w2_scale": layer.w2_scale,
            "a1_scale": given.scales,
            "num_local_tokens": given.num_local_tokens,
            "moe_sorting_dispatch_policy": self._case.sorting_policy,
            "dtype": torch.bfloat16,
            "hidden_pad": self._case.hidden_pad,
            "intermediate_pad": self._case.intermediate_pad,
            "bias1": weights.bias1,
            "bias2": weights.bias2,
            **self._of_newer_releases(),
        }

    def _of_newer_releases(self) -> dict[str, Any]:
        """Return the arguments that only newer releases take, where the case has them."""
        return {"swiglu_limit": self._case.swiglu_limit} if self._case.swiglu_limit else {}

    def prepared(self, weights: ExpertWeights) -> PreparedWeights:
        """Return the weights in aiter's layout, which are kept for the next call with the same tensors."""
        w1, w2 = weights.w1, weights.w2
        if self._known is None or self._known[0][0] is not w1 or self._known[0][1] is not w2:
            self._known = ((w1, w2), prepare_weights(w1, w2, self.package.shuffle.shuffle_weight, self._payload))
        return self._known[1]

    def _choice(self, rows: int) -> KernelChoice:
        package = self.package
        bucket = int(package.moe.get_padded_M(rows))
        metadata = package.moe.get_2stage_cfgs(**self._selection_arguments(bucket))
        block_m = int(metadata.block_m)
        name1, name2 = (_kernel_name(stage) for stage in (metadata.stage1, metadata.stage2))
        one_stage = bool(metadata.run_1stage)
        stage1, stage2, k1, k2 = name1, name2, tile_k(name1), tile_k(name2)
        if not name1 and one_stage:
            stage1, stage2, k1, k2 = f"asm_1stage_bm{ONE_STAGE_BLOCK_M}", "", DEFAULT_TILE_K, DEFAULT_TILE_K
        elif not name1:
            stage1, k1 = default_stage(1, block_m, self._key, self._rules)
            stage2, k2 = default_stage(2, block_m, self._key, self._rules)
        return KernelChoice(
            rows=rows,
            bucket=bucket,
            source="tuned" if name1 else "heuristic",
            block_m=block_m,
            ksplit=int(metadata.ksplit) if int(metadata.ksplit) > 1 else named_split(name1),
            run_1stage=one_stage,
            stage1=stage1,
            stage2=stage2,
            stage2_mode="atomic" if one_stage or not name2 else stage2_mode(name2),
            tile_k1=k1,
            tile_k2=k2,
        )

    def _selection_arguments(self, bucket: int) -> dict[str, Any]:
        """Return the arguments of this release's selection function, by its own names."""
        package, key = self.package, self._key
        fp8 = key.quant == "fp8"
        payload = package.root.dtypes.fp8 if fp8 else torch.bfloat16
        known = {
            "token": bucket,
            "model_dim": key.model_dim,
            "inter_dim": key.inter_dim,
            "expert": key.num_local_experts,
            "topk": key.topk,
            "dtype": torch.bfloat16,
            "q_dtype_a": payload,
            "q_dtype_w": payload,
            "q_type": package.root.QuantType.per_1x128 if fp8 else package.root.QuantType.No,
            "use_g1u1": True,
            "activation": self._activation,
            "doweight_stage1": key.doweight_stage1,
            "hidden_pad": self._case.hidden_pad,
            "intermediate_pad": self._case.intermediate_pad,
            "bias1": None,
            "bias2": None,
            "is_shuffled": True,
            "is_ep": True,
        }
        wanted = inspect.signature(package.moe.get_2stage_cfgs).parameters
        unknown = [name for name, one in wanted.items() if one.default is one.empty and name not in known]
        if unknown:
            message = (
                f"aiter {package.version}: get_2stage_cfgs asks for {', '.join(unknown)}, which distbench does "
                "not know; use a release of docs/aiter.md"
            )
            raise Unsupported(message)
        return {name: known[name] for name in wanted if name in known}

    def _build_name(self, bucket: int) -> str:
        """Return a key of a bucket's build: kernels with different keys may be in different modules."""
        key = msgspec.to_builtins(self._key) | {"version": self.package.version, "bucket": bucket}
        return "-".join(str(part) for part in key.values())

    def _empty_call(self, weights: ExpertWeights, rows: int) -> None:
        key = self._key
        hidden = weights.w1.new_zeros(rows, key.model_dim).to(self._payload)
        given = ExpertInput(
            hidden=hidden,
            scales=hidden.new_ones(rows, key.model_dim // BLOCK, dtype=torch.float32) if key.quant == "fp8" else None,
            weights=hidden.new_zeros(rows, key.topk, dtype=torch.float32),
            ids=hidden.new_zeros(rows, key.topk, dtype=torch.int32),
            num_local_tokens=hidden.new_zeros(1, dtype=torch.int32),
        )
        try:
            self(given, weights)
        except RuntimeError as error:
            if _UNFIT not in str(error):
                raise
            raise Unsupported(_unfit(rows, one_line(error))) from error

    def _check_device(self, weights: Tensor) -> None:
        if weights.device.type == "cpu" and not self._case.emulate:
            message = "experts aiter: computes on a GPU, but the case's device is cpu; use --device cuda, or --emulate"
            raise Unsupported(message)


def make_aiter_experts(case: Case) -> AiterExperts:
    """Return the experts of `case` over aiter, or over its stand-in where the case emulates.

    Raises:
        Unsupported: aiter cannot be imported; the message says what to install.
        InvalidCase: see `AiterExperts`; or the stand-in has no such quirk.
    """
    package = load_package(STAND_IN if case.emulate else PACKAGE)
    if case.emulate:
        package = _assume(package, case)
    return AiterExperts(case, package)


def _assume(package: AiterPackage, case: Case) -> AiterPackage:
    """Set the stand-in to the release and the device of `case`."""
    quirks = package.root.quirks
    assumed = quirks.Assumed(
        quirks=quirks.parse_quirks(case.aiter_habits),
        version=case.aiter_version or quirks.NEWEST,
        cu_count=case.cu_count,
        table=case.kernel_table,
        overrides=overrides_of(case),
        seed=case.seed,
    )
    quirks.assume(assumed)
    return package._replace(version=assumed.version)


def _check_fp8(case: Case, arch: str) -> None:
    if case.fp8_format != fp8_format(arch):
        message = f"fp8_format = {case.fp8_format}: aiter's kernels for {arch} read {fp8_format(arch)}; use that"
        raise Unsupported(message)


def _unfit(rows: int, reason: str) -> str:
    return (
        f"experts aiter: the kernels for {rows} rows cannot take this layer: {reason}; "
        "use sizes that are multiples of 128, or another limit"
    )


def _kernel_name(stage: Any) -> str:
    name = (getattr(stage, "keywords", None) or {}).get("kernelName", "")
    return name if isinstance(name, str) and name not in MISSING else ""


def make(context: ExpertsContext) -> AiterExperts:
    """Return the experts of a case; see `make_aiter_experts`."""
    return make_aiter_experts(context.case)


PLUGIN = Plugin(make=make, name="aiter", graphs=True)
