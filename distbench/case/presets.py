"""The MoE layers of public models, by name.

Numbers are those of each model's published `config.json`: hidden_size, moe_intermediate_size (intermediate_size
where all layers are experts), number of routed experts, experts per token.
"""

from __future__ import annotations

import msgspec


class ModelShape(msgspec.Struct, frozen=True, kw_only=True):
    """One MoE layer's shape. Exactly one of `num_experts` and `experts_per_rank` is set."""

    hidden_size: int
    intermediate_size: int
    topk: int
    num_experts: int | None = None
    experts_per_rank: int | None = None

    def experts_for(self, ep_size: int) -> int:
        """Number of routed experts when `ep_size` ranks share the layer."""
        if self.num_experts is not None:
            return self.num_experts
        return (self.experts_per_rank or 0) * ep_size


CUSTOM = "custom"
"""Name of a layer whose dimensions match no preset."""

DIMENSIONS = ("hidden_size", "intermediate_size", "num_experts", "topk")

PRESETS: dict[str, ModelShape] = {
    "deepseek-v3": ModelShape(hidden_size=7168, intermediate_size=2048, num_experts=256, topk=8),
    "deepseek-v2-lite": ModelShape(hidden_size=2048, intermediate_size=1408, num_experts=64, topk=6),
    "qwen3-30b-a3b": ModelShape(hidden_size=2048, intermediate_size=768, num_experts=128, topk=8),
    "qwen3-235b-a22b": ModelShape(hidden_size=4096, intermediate_size=1536, num_experts=128, topk=8),
    "mixtral-8x7b": ModelShape(hidden_size=4096, intermediate_size=14336, num_experts=8, topk=2),
    # The defaults of SGLang 0.5.23's DeepSeekV4Config.
    "deepseek-v4": ModelShape(hidden_size=4096, intermediate_size=2048, num_experts=256, topk=6),
    "kimi-k2": ModelShape(hidden_size=7168, intermediate_size=2048, num_experts=384, topk=8),
    "glm-4.5": ModelShape(hidden_size=5120, intermediate_size=1536, num_experts=160, topk=8),
    "gpt-oss-120b": ModelShape(hidden_size=2880, intermediate_size=2880, num_experts=128, topk=4),
    # For tests: the number of experts grows with the ranks, so it is divisible by any number of ranks.
    "tiny": ModelShape(hidden_size=256, intermediate_size=128, experts_per_rank=4, topk=4),
    "tiny-odd": ModelShape(hidden_size=192, intermediate_size=96, experts_per_rank=5, topk=3),
}
