"""A text with the names that are lifted of ATOM, written for tests: both rules of its cut, none of ATOM's lines.

ATOM's own text is not part of distbench, so the tests of every machine lift this one. `tests/slim_wheel.py` says where
the real one is read.
"""

from __future__ import annotations

from distbench.case.atom_folder import KERNEL, PLUGIN, PLUGIN_CONFIG, PREPARE

_KERNEL = """
import a_module_that_no_machine_has

class FusedMoEActivationFormat(Enum):
    Standard = 1

@dataclass
class ExpertTokensMetadata:
    expert_num_tokens: object

class FusedMoEPrepareAndFinalize(ABC):
    @abstractmethod
    def prepare(self): ...

class FusedMoEModularKernel(torch.nn.Module):
    def __init__(self, prepare_finalize, shared_experts=None, quant_config=None):
        super().__init__()
        self.prepare_finalize, self.quant_config = prepare_finalize, quant_config

    def _maybe_trim_dispatch_output(self, rows, scale, ids, weights, own_ids, meta):
        context = get_forward_context().context
        keep = context.graph_bs * get_dp_group().world_size
        decode = getattr(context, "dp_uniform_decode", not context.is_prefill)
        if decode and keep < rows.shape[0]:
            scale = None if scale is None else scale[:keep]
            rows, ids, weights = rows[:keep], ids[:keep], weights[:keep]
        return rows, scale, ids, weights

    def forward(
        self, hidden_states, w1, w2, topk_weights, topk_ids, quant_type, global_num_experts, expert_mask,
        w1_scale, w2_scale,
    ):
        assert not tbo_overlap_enabled()
        rows, scale, meta, ids, weights = self.prepare_finalize.prepare(
            hidden_states, topk_weights, topk_ids, quant_type
        )
        rows, scale, ids, weights = self._maybe_trim_dispatch_output(rows, scale, ids, weights, topk_ids, meta)
        made = fused_moe(
            rows, w1, w2, weights, ids, expert_mask, quant_type=quant_type, num_local_tokens=meta.expert_num_tokens,
            w1_scale=w1_scale, w2_scale=w2_scale, a1_scale=scale, dtype=hidden_states.dtype,
        )
        return self.prepare_finalize.finalize(made, topk_ids)
"""

_PREPARE = """
_FP4_DISPATCH = envs.ATOM_MORI_FP4_DISPATCH
_FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)

@dataclass(frozen=True)
class MoriDispatchFormat:
    dtype: object

def resolve_mori_dispatch(in_dtype, hidden_dim):
    assert not _FP4_DISPATCH
    return MoriDispatchFormat(in_dtype)

class MoriPrepareAndFinalize(mk.FusedMoEPrepareAndFinalize):
    use_fp4_dispatch = output_is_reduced = topk_indices_dtype = supports_async = None
    quant_type = activation_format = max_num_tokens_per_rank = None

    def __init__(self, op, max_tokens_per_rank, num_dispatchers, dispatch_format):
        self.op, self.dispatchers, self.format = op, num_dispatchers, dispatch_format

    def use_fp8_dispatch(self):
        return self.format.dtype in _FP8_DTYPES

    def num_dispatchers(self):
        return self.dispatchers

    def _get_dispatch_config(self, tokens=None):
        prefill = get_forward_context().context.is_prefill
        return (min(128, get_cu_num()), 16) if prefill else (min(64, get_cu_num()), 4)

    def prepare(self, rows, weights, ids, quant_type):
        scale = None
        if self.use_fp8_dispatch():
            from aiter import get_hip_quant

            rows, scale = get_hip_quant(quant_type)(rows, quant_dtype=dtypes.fp8)
        got, got_weights, got_scale, got_ids, live = self.op.dispatch(
            rows, weights, scale, ids, *self._get_dispatch_config(rows.shape[0])
        )
        return got, got_scale, mk.ExpertTokensMetadata(live), got_ids, got_weights

    def finalize(self, made, ids):
        count = ids.shape[0]
        return self.op.combine(made, None, ids, *self._get_dispatch_config(count))[0][:count]
"""

_PLUGIN = """
_MORI_PATCH_APPLIED = False

def _is_stream_capturing():
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()

def _is_uniform_full_graph_batch():
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import get_forward_context, is_forward_context_available

    if not is_forward_context_available():
        return False
    context = get_forward_context()
    return context.cudagraph_runtime_mode == CUDAGraphMode.FULL and context.batch_descriptor.uniform

def _try_get_exact_valid_rows(live):
    return None if _is_stream_capturing() else int(live[0])

def trim_vllm_mori_dispatch_tensors(rows, scale, ids, weights, own_ids, ranks, live):
    if _is_uniform_full_graph_batch():
        keep = own_ids.numel() * ranks
    else:
        keep = _try_get_exact_valid_rows(live)
    if keep and keep < rows.shape[0]:
        scale = None if scale is None else scale[:keep]
        rows, ids, weights = rows[:keep], ids[:keep], weights[:keep]
    return rows, scale, ids, weights

def apply_vllm_mori_patch():
    global _MORI_PATCH_APPLIED

    def launch(self, tokens=None):
        large = tokens >= VLLM_MORI_LAUNCH_CONFIG_TOKEN_THRESHOLD
        return (min(128, get_cu_num()), 16) if large else (min(64, get_cu_num()), 4)

    @functools.wraps(mk.FusedMoEModularKernel._maybe_trim_dispatch_output)
    def trim(self, rows, scale, ids, weights, own_ids, meta):
        ranks = self.prepare_finalize.num_dispatchers()
        return trim_vllm_mori_dispatch_tensors(rows, scale, ids, weights, own_ids, ranks, meta.expert_num_tokens)

    MoriPrepareAndFinalize._get_dispatch_config = launch
    mk.FusedMoEModularKernel._maybe_trim_dispatch_output = trim
    _MORI_PATCH_APPLIED = True
"""

TEXT: dict[str, str] = {
    KERNEL: _KERNEL,
    PREPARE: _PREPARE,
    PLUGIN_CONFIG: "VLLM_MORI_LAUNCH_CONFIG_TOKEN_THRESHOLD = 4096\n",
    PLUGIN: _PLUGIN,
}
