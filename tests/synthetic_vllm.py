"""A text with the names that are lifted of vLLM, written for tests: the same steps, none of vLLM's lines beyond names.

vLLM's own text is not part of distbench, so the tests of every machine lift this one. `tests/slim_wheel.py` says where
the released text is read.
"""

from __future__ import annotations

from distbench.callers.vllm.definitions import ACTIVATION, AITER_OPS, EXPERT_MAP, EXPERTS, KERNEL, PREPARE

VERSION = "0.0.1"

_ACTIVATION = """
import a_module_that_no_machine_has

class MoEActivation(Enum):
    SILU = "silu"

_STR_ALIASES = {}
_CUSTOM_OP_NAMES = {}
_WITHOUT_MUL = {}
"""

_KERNEL = """
class FusedMoEActivationFormat(Enum):
    Standard = 1

@dataclass
class ExpertTokensMetadata:
    expert_num_tokens: object
    expert_num_tokens_cpu: object = None

class FusedMoEExpertsModular(FusedMoEExperts):
    def is_monolithic(self):
        return False

    def moe_problem_size(self, a1, w1, w2, topk_ids):
        return w1.shape[0], a1.shape[0], w1.shape[1], a1.shape[1], topk_ids.shape[1]

    def workspace_dtype(self, dtype):
        return dtype

    def output_hidden_dim(self, hidden):
        return hidden

@final
class FusedMoEKernelModularImpl:
    def _prepare(self, rows, weights, ids, experts, mask):
        defer = self.fused_experts.expects_unquantized_inputs
        quant = self.fused_experts.quant_config
        return self.prepare_finalize.prepare(rows, weights, ids, experts, mask, False, quant, defer)

    def _fused_experts(self, dtype, rows, scale, w1, w2, weights, ids, activation, experts, mask, meta):
        _, count, inner, hidden, topk = self.fused_experts.moe_problem_size(rows, w1, w2, ids)
        first, second, out, _ = self._allocate_buffers(
            dtype, rows.device, count, count, inner, hidden, topk, experts, w1.shape[0], meta, activation
        )
        self.fused_experts.apply(
            out, rows, w1, w2, weights, ids, activation, experts, mask, scale, None, first, second, meta, False
        )
        return out

    def _finalize(self, output, made, weights, ids):
        reduction = self.fused_experts.finalize_weight_and_reduce_impl()
        self.prepare_finalize.finalize(output, made, weights, ids, False, reduction)
        return output

    def apply(self, hidden_states, w1, w2, topk_ids, topk_weights, activation, global_num_experts, expert_map):
        output = torch.empty_like(hidden_states)
        rows, scale, meta, ids, weights = self._prepare(
            hidden_states, topk_weights, topk_ids, global_num_experts, expert_map
        )
        made = self._fused_experts(
            hidden_states.dtype, rows, scale, w1, w2, weights, ids, activation, global_num_experts, expert_map, meta
        )
        return self._finalize(output, made, weights, ids)
"""

_AITER_OPS = """
def _validate_rocm_aiter_fused_moe_shared_expert_args():
    return False

def _rocm_aiter_fused_moe_impl(rows, w1, w2, weights, ids, mask, activation, quant, scales, live, dtype, policy, limit):
    from aiter import ActivationType, QuantType
    from aiter.fused_moe import fused_moe

    return fused_moe(
        rows, w1, w2, weights, ids, mask, ActivationType(activation), QuantType(quant), False, *scales,
        num_local_tokens=live, dtype=dtype, moe_sorting_dispatch_policy=policy, swiglu_limit=limit,
    )

class rocm_aiter_ops:
    @staticmethod
    def fused_moe(*arguments):
        return torch.ops.vllm.rocm_aiter_fused_moe(*arguments)
"""

_EXPERTS = """
class QuantMethod(IntEnum):
    NO = 0
    PER_TOKEN = 2
    BLOCK_128x128 = 5

class ActivationMethod(IntEnum):
    SILU = 0

def aiter_moe_pads():
    return 0, 0

def rocm_aiter_fused_experts(rows, w1, w2, weights, ids, mask, quant, scale, live, dtype, policy):
    method = QuantMethod.NO if quant.block_shape is None else QuantMethod.BLOCK_128x128
    scales = (quant.w1_scale, quant.w2_scale, scale, None)
    return rocm_aiter_ops.fused_moe(
        rows, w1, w2, weights, ids, mask, ActivationMethod.SILU.value, method.value, scales, live, dtype, policy, 0.0
    )

class AiterExperts(mk.FusedMoEExpertsModular):
    @property
    def expects_unquantized_inputs(self):
        return not self.moe_config.use_mori_kernels

    def finalize_weight_and_reduce_impl(self):
        return TopKWeightAndReduceNoOP()

    def workspace_shapes(self, rows, inner, hidden, *layer):
        return (0,), (0,), (rows, hidden)

    def apply(self, out, rows, w1, w2, weights, ids, activation, experts, mask, scale, scale2, one, two, meta, early):
        policy = rocm_aiter_ops.get_moe_dispatch_policy()
        live = meta.expert_num_tokens
        out.copy_(
            rocm_aiter_fused_experts(
                rows, w1, w2, weights, ids, mask, self.quant_config, scale, live, out.dtype, policy
            )
        )
"""

_PREPARE = """
class MoriPrepareAndFinalize(mk.FusedMoEPrepareAndFinalizeModular):
    def __init__(self, mori_op, max_tokens_per_rank, num_dispatchers, use_fp8_dispatch=False):
        self.mori_op = mori_op
        self.use_fp8_dispatch = use_fp8_dispatch
        self.sent_ids = None

    def prepare(self, rows, weights, ids, experts, mask, early, quant, defer):
        scale = None
        if self.use_fp8_dispatch and not defer:
            from aiter import QuantType, get_hip_quant

            rows, scale = get_hip_quant(QuantType.per_1x128)(rows, quant_dtype=current_platform.fp8_dtype())
        self.sent_ids = ids
        got, got_weights, got_scale, got_ids, live = self.mori_op.dispatch(rows, weights, scale, ids)
        return got, got_scale, mk.ExpertTokensMetadata(live), got_ids, got_weights

    def finalize(self, output, made, weights, ids, early, reduction):
        output.copy_(self.mori_op.combine(made, None, self.sent_ids)[0][: output.shape[0]])
"""

_EXPERT_MAP = """
def determine_expert_map(ep_size, ep_rank, global_num_experts, return_expert_mask=False):
    if ep_size == 1:
        return global_num_experts, None, None
    count = global_num_experts // ep_size
    mask = torch.zeros(global_num_experts + 1, dtype=torch.int32)
    first = ep_rank * count
    mask[first : first + count] = 1
    return count, None, mask
"""

TEXT: dict[str, str] = {
    ACTIVATION: _ACTIVATION,
    KERNEL: _KERNEL,
    AITER_OPS: _AITER_OPS,
    EXPERTS: _EXPERTS,
    PREPARE: _PREPARE,
    EXPERT_MAP: _EXPERT_MAP,
}
