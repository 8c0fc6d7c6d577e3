"""The MoE layers of public models, by name.

Numbers are those of each model's published `config.json` (model_config.py says which fields), but for the presets for
tests.
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
    layers: int = 1
    """MoE layers of the model, without those for the prediction of further tokens."""
    shared_experts: int = 0
    """Experts that every token takes besides its top-k; they are no part of a case."""
    source: str = ""
    """Repository of the config.json on Hugging Face, or another text that has the numbers; empty: made for tests."""
    published: str = ""
    """Month in which the source was published, `2024-12`."""

    def experts_for(self, ep_size: int) -> int:
        """Number of routed experts when `ep_size` ranks share the layer."""
        if self.num_experts is not None:
            return self.num_experts
        return (self.experts_per_rank or 0) * ep_size


CUSTOM = "custom"
"""Name of a layer whose dimensions match no preset."""

DIMENSIONS = ("hidden_size", "intermediate_size", "num_experts", "topk")


def _shape(  # noqa: PLR0913 - the columns of a table
    source: str, published: str, layers: int, hidden: int, intermediate: int, experts: int, topk: int, shared: int = 0
) -> ModelShape:
    return ModelShape(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_experts=experts,
        topk=topk,
        layers=layers,
        shared_experts=shared,
        source=source,
        published=published,
    )


PRESETS: dict[str, ModelShape] = {
    "deepseek-v3": _shape("deepseek-ai/DeepSeek-V3", "2024-12", 58, 7168, 2048, 256, 8, 1),
    "deepseek-v2": _shape("deepseek-ai/DeepSeek-V2", "2024-05", 59, 5120, 1536, 160, 6, 2),
    "deepseek-v2-lite": _shape("deepseek-ai/DeepSeek-V2-Lite", "2024-05", 26, 2048, 1408, 64, 6, 2),
    "deepseek-v4": _shape("SGLang 0.5.23, DeepSeekV4Config", "2026-11", 43, 4096, 2048, 256, 6, 1),
    "qwen3-30b-a3b": _shape("Qwen/Qwen3-30B-A3B", "2025-04", 48, 2048, 768, 128, 8),
    "qwen3-235b-a22b": _shape("Qwen/Qwen3-235B-A22B", "2025-04", 94, 4096, 1536, 128, 8),
    "qwen3-next-80b-a3b": _shape("Qwen/Qwen3-Next-80B-A3B-Instruct", "2025-09", 48, 2048, 512, 512, 10, 1),
    "qwen3.5-35b-a3b": _shape("Qwen/Qwen3.5-35B-A3B", "2026-02", 40, 2048, 512, 256, 8, 1),
    "mixtral-8x7b": _shape("mistralai/Mixtral-8x7B-v0.1", "2023-12", 32, 4096, 14336, 8, 2),
    "kimi-k2": _shape("moonshotai/Kimi-K2-Instruct", "2025-07", 60, 7168, 2048, 384, 8, 1),
    "glm-4.5": _shape("zai-org/GLM-4.5", "2025-07", 89, 5120, 1536, 160, 8, 1),
    "glm-4.5-air": _shape("zai-org/GLM-4.5-Air", "2025-07", 45, 4096, 1408, 128, 8, 1),
    "glm-5": _shape("zai-org/GLM-5", "2026-02", 75, 6144, 2048, 256, 8, 1),
    "minimax-m2": _shape("MiniMaxAI/MiniMax-M2", "2025-10", 62, 3072, 1536, 256, 8),
    "gpt-oss-120b": _shape("openai/gpt-oss-120b", "2025-08", 36, 2880, 2880, 128, 4),
    "llama-4-maverick": _shape("meta-llama/Llama-4-Maverick-17B-128E", "2025-04", 24, 5120, 8192, 128, 1, 1),
    "hunyuan-a13b": _shape("tencent/Hunyuan-A13B-Instruct", "2025-06", 32, 4096, 3072, 64, 8, 1),
    "ling-mini-2.0": _shape("inclusionAI/Ling-mini-2.0", "2025-09", 19, 2048, 512, 256, 8, 1),
    # For tests: the number of experts grows with the ranks, so it is divisible by any number of ranks.
    "tiny": ModelShape(hidden_size=256, intermediate_size=128, experts_per_rank=4, topk=4),
    "tiny-odd": ModelShape(hidden_size=192, intermediate_size=96, experts_per_rank=5, topk=3),
}

ALIASES = {
    "deepseek-r1": "deepseek-v3",
    "deepseek-r1-0528": "deepseek-v3",
    "deepseek-v3-0324": "deepseek-v3",
    "deepseek-v3.1": "deepseek-v3",
    "deepseek-v3.2": "deepseek-v3",
    "deepseek-v4-flash": "deepseek-v4",
    "kimi-k2-instruct": "kimi-k2",
    "kimi-k2-thinking": "kimi-k2",
    "kimi-k2.5": "kimi-k2",
    "glm-4.6": "glm-4.5",
    "glm-4.7": "glm-4.5",
    "glm-5.1": "glm-5",
    "qwen3-next-80b-a3b-instruct": "qwen3-next-80b-a3b",
    "qwen3.6-35b-a3b": "qwen3.5-35b-a3b",
    "minimax-m2.1": "minimax-m2",
    "minimax-m2.5": "minimax-m2",
    "mixtral-8x7b-v0.1": "mixtral-8x7b",
    "llama-4-maverick-17b-128e": "llama-4-maverick",
    "llama-4-maverick-17b-128e-instruct": "llama-4-maverick",
    "hunyuan-a13b-instruct": "hunyuan-a13b",
}
"""Models whose MoE layer has the shape of a preset."""

_CONFIG_SUFFIX = ".json"


def is_config_path(name: str) -> bool:
    """Whether a model's name is the path of a config.json, or of the folder that has it.

    A name on Hugging Face, `deepseek-ai/DeepSeek-R1`, is a preset's where it is known.
    """
    return name.endswith(_CONFIG_SUFFIX) or ("/" in name and not preset_name(name))


def preset_name(name: str) -> str:
    """Preset of a model's name or alias, with or without its owner on Hugging Face, in any case; empty for none."""
    own = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    plain = name.rpartition("/")[2].lower() if own else name.lower()
    known = ALIASES.get(plain, plain)
    return known if known in PRESETS else ""


def preset_of(shape: ModelShape) -> str:
    """Preset with the dimensions of a shape, `CUSTOM` for none."""
    same = (
        name for name, one in PRESETS.items() if all(getattr(one, key) == getattr(shape, key) for key in DIMENSIONS)
    )
    return next(same, CUSTOM)
