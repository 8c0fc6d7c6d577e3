"""The case: all that decides one run, frozen, validated and hashed.

Nothing in it is optional (resolve.py fills it in). Two ranks with the same `case_hash` hold the same case.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_type_hints

import msgspec

from distbench.case.injection import brings_faults
from distbench.case.limits import ALLOWED_LIMITS
from distbench.case.plugins import KINDS, is_built_in, is_trusted
from distbench.utils.amd_arch import Fp8Format

STAND_INS = {
    "collective": "collective for mori",
    "symmetric": "symmetric for mori",
    "reference": "reference for aiter",
    "triton": "triton for aiter",
}
EMULATED = {"mori": "distbench.transport.mori.emulated for mori", "aiter": "distbench.experts.aiter.emulated for aiter"}

Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
TokenCount = Annotated[int, msgspec.Meta(ge=0, le=1 << 24)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Rows = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]


def _help(text: str) -> msgspec.Meta:
    return msgspec.Meta(description=text)


class Case(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One test: a model layer, a routing, a limit and the rules of judgement. Field descriptions are the help texts."""

    model: Annotated[
        str,
        _help(
            "preset of the MoE layer, see `distbench presets`, or the path of a model's config.json; custom where a "
            "dimension is not the preset's"
        ),
    ] = "qwen3-30b-a3b"
    hidden_size: Annotated[Count, _help("hidden columns H")]
    intermediate_size: Annotated[Count, _help("intermediate columns I of an expert")]
    num_experts: Annotated[Count, _help("routed experts E over all ranks")]
    topk: Annotated[Count, _help("experts k of a token")]
    shared_experts: Annotated[
        Annotated[int, msgspec.Meta(ge=0, le=64)],
        _help("fused shared experts N: every rank holds all, and its tokens have a slot more for each"),
    ] = 0
    physical_experts: Annotated[
        TokenCount, _help("slots of routed experts over all ranks, slot p holds expert p modulo E; 0: E, no replicas")
    ] = 0
    placement: Annotated[
        tuple[TokenCount, ...],
        _help("expert in each slot of routed experts, as EPLB lists them: numbers, or a .json or .npy file of them"),
    ] = ()
    replica_choice: Annotated[
        Literal["dynamic", "static"],
        _help("replica that a token takes: random for each token, or one fixed for each rank, its own if it has one"),
    ] = "dynamic"
    profile: Annotated[
        Literal[
            "none",
            "sglang-epv1-decode",
            "sglang-epv1-prefill",
            "sglang-epv1-lowlatency",
            "vllm",
            "atom-native",
            "atom-vllm-plugin",
        ],
        _help("production's program, whose values are defaults and whose variables count, see `distbench profiles`"),
    ] = "none"
    ep_size: Annotated[Annotated[int, msgspec.Meta(ge=1, le=1 << 16)], _help("ranks W of the expert-parallel group")]
    tokens: Annotated[
        tuple[TokenCount, ...], _help("tokens of each rank: one number for all, or a list; 0,1,7,33,... repeats it")
    ] = (16,)
    routing: Annotated[
        str, _help("uniform, zipf:S, hot-rank:R, fan-in:R, local, duplicates, or trace:FILE@STEP.LAYER")
    ] = "uniform"
    dropped_slots: Annotated[Share, _help("share of a token's routed slots whose id is -1; a token keeps one slot")] = (
        0.0
    )
    dropped_tokens: Annotated[Share, _help("share of the tokens whose ids are all -1, which come back as zeros")] = 0.0
    routing_sha256: Annotated[str, _help("digest of the recorded routing's bytes, filled in when it is read")] = ""
    limit: Annotated[str, _help(f"rows kept: {ALLOWED_LIMITS}")] = "sum32"
    recv_bound: Annotated[
        bool, _help("with the limit off, cut at the bound that SGLang derives, where its release has one")
    ] = False
    sglang_version: Annotated[
        str, _help("SGLang release whose variables and receive bound apply; empty: the newest known")
    ] = ""
    two_batch_overlap: Annotated[
        bool,
        _help(
            "each rank's tokens run as two sub-batches, each with its own operator, the one's rows under way while the "
            "other computes; production then cuts at no receive bound"
        ),
    ] = False
    tp_size: Annotated[
        Annotated[int, msgspec.Meta(ge=0, le=1 << 16)],
        _help("production's tensor-parallel size; 0: the ranks. With any other size it cuts at no receive bound"),
    ] = 0
    sender_rows: Annotated[
        str, _help("tokens of the ranks in the scheduler's metadata, such as 9,7; empty: the real ones")
    ] = ""
    policy: Annotated[
        Literal["strict", "unchecked", "guard"],
        _help("limit below total_recv: refuse on all ranks, cut as production does, or cut to total_recv"),
    ] = "strict"
    max_dispatch_tokens_per_rank: Annotated[Count, _help("M: tokens that a sender may hold")] = 4096
    prealloc_max_recv_tokens: Annotated[
        Rows, _help("P: 0 sizes the receive buffer W * M rows, else W * min(ceil(P / W), M)")
    ] = 0
    dispatch_dtype: Annotated[
        Literal["bf16", "fp8"], _help("payload type; fp8 is e4m3 with a scale per 128 columns")
    ] = "bf16"
    fp8_format: Annotated[
        Fp8Format, _help("the device's fp8, real or emulated: e4m3fnuz on gfx942; given, no device is queried")
    ] = "e4m3fn"
    numerics: Annotated[
        Literal["both", "exact", "gaussian"],
        _help("inputs: exact in any summation order (decides bits), realistic (decides errors), or both"),
    ] = "both"
    require: Annotated[Literal["bitwise", "tolerance"], _help("equality where the numerics are gaussian alone")] = (
        "bitwise"
    )
    transport: Annotated[
        str,
        _help(
            "library that moves the rows: collective, symmetric, mori, deepep, an installed plugin, or "
            "package.module:factory"
        ),
    ] = "collective"
    transport_option: Annotated[
        str, _help("options of a transport plugin, name=value, repeatable; in a file joined by semicolons")
    ] = ""
    experts: Annotated[
        str,
        _help(
            "computes them: reference, triton, aiter, torch-grouped, vllm, sglang-triton, an installed plugin, or "
            "package.module:factory"
        ),
    ] = "reference"
    experts_option: Annotated[
        str, _help("options of an experts plugin, name=value, repeatable; in a file joined by semicolons")
    ] = ""
    caller: Annotated[
        str,
        _help(
            "whose code runs between dispatch and combine in the arm production: own (no such arm), sglang, vllm, "
            "atom, an installed plugin, or package.module:factory (docs/callers.md)"
        ),
    ] = "own"
    caller_wheel: Annotated[
        str, _help("wheel of the caller's package, whose text is lifted; empty: the installed package")
    ] = ""
    caller_wheel_sha256: Annotated[str, _help("digest of the wheel's bytes, filled in when it is read")] = ""
    caller_folder: Annotated[str, _help("caller atom: the folder that holds its package, a checkout of ATOM")] = ""
    caller_folder_sha256: Annotated[str, _help("digest of the folder's files, filled in when they are read")] = ""
    atom_rule: Annotated[
        Literal["native", "vllm-plugin"], _help("caller atom: ATOM's own cut, or that of its plugin for vLLM")
    ] = "native"
    atom_graph_bs: Annotated[
        TokenCount,
        _help("caller atom: tokens that each rank's decode batch is padded to; 0: a batch with a prefill, or eager"),
    ] = 0
    activation: Annotated[
        Literal["silu", "gelu", "swiglu"], _help("activation of an expert; swiglu is gpt-oss's, clamped at 7")
    ] = "silu"
    swiglu_limit: Annotated[
        Annotated[float, msgspec.Meta(ge=0, le=65_504)],
        _help("bound of the gate, and of up's magnitude, before the activation; 0: none is passed"),
    ] = 0.0
    bias: Annotated[bool, _help("experts have float32 biases, bias1 of gate and up and bias2 of their output")] = False
    doweight_stage1: Annotated[
        bool, _help("routing weights multiply gate and up, before bias and activation, and not the output")
    ] = False
    hidden_pad: Annotated[TokenCount, _help("last hidden columns that are padding: zeros, in and out")] = 0
    intermediate_pad: Annotated[TokenCount, _help("last intermediate columns of an expert that are padding")] = 0
    sorting_policy: Annotated[
        Annotated[int, msgspec.Meta(ge=0, le=2)],
        _help("moe_sorting_dispatch_policy of aiter: 0 by rows, 1 one block, 2 several phases; SGLang passes 2"),
    ] = 0
    aiter_habits: Annotated[
        str, _help("faults of released kernels for aiter's stand-in, comma-separated; see docs/aiter.md")
    ] = ""
    emulate: Annotated[bool, _help("replace the packages mori and aiter by distbench's stand-ins")] = False
    mori_kernel: Annotated[
        Literal["auto", "IntraNode", "IntraNodeLL", "InterNodeV1", "InterNodeV1LL", "AsyncLL"],
        _help("transport mori: its kernel type; auto chooses as SGLang does"),
    ] = "auto"
    inter_kernel_switch: Annotated[
        TokenCount, _help("transport mori, more than one node: auto takes InterNodeV1LL where M is no larger")
    ] = 256
    mori_geometry: Annotated[
        Literal["sglang", "vllm", "atom-prefill", "atom-decode"],
        _help("transport mori: whose blocks and warps of its kernel type, and queue pairs"),
    ] = "sglang"
    gpu_per_node: Annotated[
        Annotated[int, msgspec.Meta(ge=0, le=1024)],
        _help("transport mori: ranks of a node; 0 for the launch's ranks per node. Other numbers: only emulated"),
    ] = 0
    combine_quant: Annotated[
        Literal["none", "fp8_direct_cast", "fp8_blockwise", "fp4_blockwise"],
        _help("transport mori: how expert rows are quantised on their way back"),
    ] = "none"
    combine_input: Annotated[
        Literal["external", "registered"], _help("transport mori: combine copies any tensor, or reads mori's buffer")
    ] = "external"
    launch_mode: Annotated[
        Literal["MANUAL", "AUTO"], _help("transport mori: pinned launch geometry, or mori's tuning tables")
    ] = "MANUAL"
    mori_habits: Annotated[
        str, _help("transport mori, emulated: releases and quirks of the stand-in, see docs/mori.md; empty: 1.2.4")
    ] = ""
    device: Annotated[Literal["auto", "cpu", "cuda"], _help("where the ranks compute; cuda is ROCm's name too")] = (
        "auto"
    )
    share_devices: Annotated[
        bool,
        _help(
            "ranks of a node share its devices where there are fewer of them than ranks; without NCCL, and times mean "
            "nothing"
        ),
    ] = False
    slot_order: Annotated[
        Literal["shuffled", "source"], _help("order of received rows: seeded shuffle (atomics) or by source")
    ] = "shuffled"
    kernel_table: Annotated[
        str,
        _help(
            "CSV in aiter's tuned_fmoe format, several joined by colons, or a table of `distbench tune` for triton; "
            "empty: none, or its own"
        ),
    ] = ""
    kernel_table_sha256: Annotated[str, _help("digest of the table's bytes, filled in when it is read")] = ""
    aiter_ksplit: Annotated[
        Annotated[int, msgspec.Meta(ge=-1, le=1 << 16)],
        _help("AITER_KSPLIT: parts of K without a tuned row, where not 0; -1: no split in tuned rows either"),
    ] = 0
    aiter_bypass_tune: Annotated[bool, _help("AITER_BYPASS_TUNE_CONFIG: tuned rows are ignored")] = False
    aiter_version: Annotated[str, _help("aiter release whose selection rules apply; empty: the newest known")] = ""
    cu_count: Annotated[
        Annotated[int, msgspec.Meta(ge=1, le=4096)], _help("compute units assumed by the heuristics")
    ] = 304
    seed: Annotated[Annotated[int, msgspec.Meta(ge=0, le=1 << 62)], _help("seed of inputs and shuffles")] = 0
    repeats: Annotated[Annotated[int, msgspec.Meta(ge=1, le=1_000_000)], _help("times that all arms run")] = 1
    gather: Annotated[
        Literal["auto", "rows", "digests"], _help("what rank 0 compares: rows, 128-bit digests, or by size")
    ] = "auto"
    until_failure: Annotated[
        bool, _help("stop the repeats, 10000 where no number is given, at the first one that differs")
    ] = False
    jitter: Annotated[
        Annotated[float, msgspec.Meta(ge=0, le=60_000)],
        _help("milliseconds: each rank waits a seeded random time of at most this before each stage"),
    ] = 0.0
    inject: Annotated[
        str,
        _help(
            "faults to inject, NAME[:key=value,...] joined by semicolons; from `distbench faults` or `mutants --list`, "
            "an installed plugin, or package.module:Fault"
        ),
    ] = ""
    iterations: Annotated[
        Annotated[int, msgspec.Meta(ge=0, le=4096)], _help("timed iterations of each arm, at most; 0 times nothing")
    ] = 0
    warmup: Annotated[
        Annotated[int, msgspec.Meta(ge=0, le=4096)], _help("untimed iterations in front of the timed ones")
    ] = 5
    median_error: Annotated[
        Annotated[float, msgspec.Meta(ge=0, le=1)],
        _help("timing stops once the median's 95 % CI is within this share of it; 0: all iterations"),
    ] = 0.0
    flush_l2: Annotated[bool, _help("overwrite the L2 cache before each timed iteration")] = False
    align: Annotated[
        Literal["barrier", "free"], _help("ranks start a timed iteration together, or each after its previous one")
    ] = "barrier"
    graph: Annotated[
        bool | Literal["experts", "layer"],
        _help(
            "experts: run the experts from a CUDA graph, captured for each number of rows; layer: replay all of the "
            "layer in one graph, with other tokens"
        ),
    ] = False
    timeout: Annotated[
        Annotated[float, msgspec.Meta(gt=0, le=86400)], _help("seconds any one stage may take, looked at every 0.1 s")
    ] = 300.0
    stage_timeouts: Annotated[str, _help("other seconds for some stages, such as dispatch=5,experts=60")] = ""

    @property
    def experts_per_rank(self) -> int:
        """Local experts El, replicas and shared ones too; every rank holds as many (MoRI's num_experts_per_rank)."""
        return (self.physical_experts or self.num_experts) // self.ep_size + self.shared_experts

    @property
    def placed_experts(self) -> int:
        """Experts of all ranks, a replica and each rank's shared ones counted apart: ids are below it."""
        return self.experts_per_rank * self.ep_size

    @property
    def topk_slots(self) -> int:
        """Slots of a token: its k routed experts and the shared ones."""
        return self.topk + self.shared_experts

    @property
    def uses_fp8(self) -> bool:
        """Whether rows travel as fp8, to the experts or back."""
        return self.dispatch_dtype == "fp8" or self.combine_quant in ("fp8_direct_cast", "fp8_blockwise")

    @property
    def limit_key(self) -> Literal["limit", "recv_bound"]:
        """The key that sets the cut: SGLang's receive bound applies only where it is asked for and the limit is off."""
        return "recv_bound" if self.recv_bound and self.limit == "off" else "limit"

    @property
    def sub_batch_tokens(self) -> tuple[tuple[int, ...], ...]:
        """Tokens of each rank in both sub-batches of two-batch overlap; nothing without it.

        SGLang 0.5.23 cuts a decode batch of one token a sequence at n // 2, and a prefill batch there or at a sequence
        next to it (`compute_split_seq_index`, `_split_extend_seqs` of `batch_overlap/two_batch_overlap.py`).
        """
        if not self.two_batch_overlap:
            return ()
        return tuple(count // 2 for count in self.tokens), tuple(count - count // 2 for count in self.tokens)

    @property
    def stand_ins(self) -> list[str]:
        """The stand-ins that replace mori and aiter, and devices of each rank's own."""
        known = STAND_INS | (EMULATED if self.emulate else {})
        parts = [known[name] for name in (self.transport, self.experts) if name in known]
        return [*parts, "ranks that share devices"] if self.share_devices else parts

    @property
    def plugins(self) -> list[str]:
        """The parts that other packages bring or are, such as transport acme."""
        return [f"{part} {name}" for part in KINDS if not is_trusted(part, name := getattr(self, part))]

    @property
    def capacity(self) -> int:
        """R, rows of the receive buffer (MoRI: W * M, or W * min(ceil(P / W), M) where P is given)."""
        share = self.max_dispatch_tokens_per_rank
        if self.prealloc_max_recv_tokens:
            share = min(-(-self.prealloc_max_recv_tokens // self.ep_size), share)
        return self.ep_size * share


DERIVED_KEYS = ("routing_sha256", "kernel_table_sha256", "caller_wheel_sha256", "caller_folder_sha256")
FLAG_KEYS = ("caller", "caller_wheel", "caller_folder")
"""Keys that name code to execute: a file may name it only where a flag does too."""
UNSTORED_KEYS = (*DERIVED_KEYS, "caller_wheel", "caller_folder")
"""Keys of a recorded case that are not taken from its record."""
CALLER_KEYS = (*FLAG_KEYS, "atom_rule", "atom_graph_bs")
"""Keys of a caller that users give."""
CALL_KEYS = (
    "activation",
    "swiglu_limit",
    "bias",
    "doweight_stage1",
    "hidden_pad",
    "intermediate_pad",
    "sorting_policy",
)
"""Keys that are arguments of `fused_moe`."""
SHAPE_KEYS = (
    "shared_experts",
    "physical_experts",
    "placement",
    "replica_choice",
    "dropped_slots",
    "dropped_tokens",
)
"""Keys of a deployment's shape."""
FIELD_HINTS: dict[str, Any] = get_type_hints(Case, include_extras=True)
FIELD_TYPES: dict[str, Any] = FIELD_HINTS | {
    "tokens": TokenCount | tuple[TokenCount, ...],
    "placement": str | tuple[TokenCount, ...],
    "limit": str | int,
}
FIELD_DEFAULTS: dict[str, Any] = {
    field.name: field.default for field in msgspec.structs.fields(Case) if not field.required
}


def names_code(key: str, value: Any) -> bool:
    """Whether `value` of `key` names code to execute that is not distbench's: only a flag may."""
    if key in FLAG_KEYS:
        return bool(value != FIELD_DEFAULTS[key])
    if key == "inject" and isinstance(value, str):
        return brings_faults(value)
    return key in KINDS and isinstance(value, str) and not is_built_in(key, value)
