"""Models by their own config.json: field names of each family, aliases, and refusals that name the field."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from distbench.case.model_config import config_shape
from distbench.case.presets import ALIASES, PRESETS, ModelShape
from distbench.case.resolve import Layer, Resolved, resolve_case
from distbench.errors import InvalidCase

DEEPSEEK = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "n_group": 8,
}
QWEN3 = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "router_aux_loss_coef": 0.001,
}
LISTS = {
    "model_type": "hunyuan_v1_moe",
    "hidden_size": 4096,
    "intermediate_size": 3072,
    "num_hidden_layers": 32,
    "num_experts": 64,
    "moe_topk": [8] * 32,
    "moe_intermediate_size": [3072] * 32,
    "num_shared_expert": [1] * 32,
}
LLAMA = {
    "model_type": "llama4_text",
    "hidden_size": 5120,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "num_local_experts": 128,
    "num_experts_per_tok": 1,
    "num_hidden_layers": 48,
    "interleave_moe_layer_step": 2,
}
PLAIN = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
}
LING = {
    "model_type": "bailing_moe",
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "moe_intermediate_size": 512,
    "moe_shared_expert_intermediate_size": 512,
    "num_shared_experts": 1,
    "num_experts": 256,
    "n_group": 8,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 20,
    "first_k_dense_replace": 1,
}
MINIMAX = PLAIN | {
    "model_type": "minimax_m2",
    "hidden_size": 3072,
    "intermediate_size": 1536,
    "num_local_experts": 256,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 62,
    "shared_intermediate_size": 0,
}
GPT_OSS = PLAIN | {
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "experts_per_token": 4,
    "num_hidden_layers": 36,
}
NEXT = QWEN3 | {
    "model_type": "qwen3_next",
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "num_experts": 512,
    "num_experts_per_tok": 10,
}
GLM = DEEPSEEK | {
    "model_type": "glm_moe_dsa",
    "hidden_size": 6144,
    "num_hidden_layers": 78,
    "index_topk": 2048,
    "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 75,
}
KIMI = DEEPSEEK | {"model_type": "kimi_k2", "n_routed_experts": 384, "first_k_dense_replace": 1}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek": ("deepseek-v3", DEEPSEEK),
    "kimi, in its part for text": ("kimi-k2", {"model_type": "kimi_k25", "text_config": KIMI}),
    "glm": ("glm-5", GLM),
    "qwen3": ("qwen3-30b-a3b", QWEN3),
    "qwen3-next": ("qwen3-next-80b-a3b", NEXT),
    "hunyuan, a number for each layer": ("hunyuan-a13b", LISTS),
    "llama-4, every other layer": ("llama-4-maverick", {"model_type": "llama4", "text_config": LLAMA}),
    "mixtral": ("mixtral-8x7b", PLAIN),
    "minimax": ("minimax-m2", MINIMAX),
    "gpt-oss": ("gpt-oss-120b", GPT_OSS),
    "ling": ("ling-mini-2.0", LING),
}


def write(folder: Path, config: Any) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return str(path)


def resolve(*layers: dict[str, Any]) -> Resolved:
    return resolve_case([Layer(f"test {index}", values) for index, values in enumerate(layers)], 8)


@pytest.mark.parametrize("family", FAMILIES)
def test_config_of_each_family_has_the_shape_of_its_preset(tmp_path: Path, family: str) -> None:
    name, config = FAMILIES[family]
    path = write(tmp_path, config)
    preset, shape = PRESETS[name], config_shape(path)
    same = ("hidden_size", "intermediate_size", "num_experts", "topk", "layers", "shared_experts")
    assert {key: getattr(shape, key) for key in same} == {key: getattr(preset, key) for key in same}


def test_config_is_a_source_of_the_dimensions_and_names_the_preset_that_has_them(tmp_path: Path) -> None:
    path = write(tmp_path, DEEPSEEK)
    for given in (path, str(tmp_path)):
        resolved = resolve({"model": given})
        assert (resolved.case.model, resolved.case.num_experts) == ("deepseek-v3", 256)
        assert resolved.sources["num_experts"] == f"config:{given}"
    assert resolve({"model": str(tmp_path)}).case == resolve({"model": "deepseek-v3"}).case


def test_config_that_no_preset_has_is_custom_and_a_key_beside_it_wins(tmp_path: Path) -> None:
    path = write(tmp_path, DEEPSEEK | {"hidden_size": 1024})
    assert resolve({"model": path}).case.model == "custom"
    resolved = resolve({"model": path, "topk": 4})
    assert (resolved.case.hidden_size, resolved.case.topk) == (1024, 4)
    stronger = resolve({"model": "tiny"}, {"model": str(tmp_path / "missing.json")})
    assert (stronger.case.model, stronger.case.hidden_size) == ("tiny", 256)


def without(config: dict[str, Any], *names: str, **more: Any) -> dict[str, Any]:
    return {name: value for name, value in (config | more).items() if name not in names}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            without(DEEPSEEK, "n_routed_experts", my_experts=9),
            "no field n_routed_experts or .*not known here: my_experts ",
        ),
        (without(QWEN3, "moe_intermediate_size"), "no field moe_intermediate_size .model_type 'qwen3_moe'; known are"),
        (without(PLAIN, "num_experts_per_tok", top_k=50), "no field num_experts_per_tok or [^;]*.model_type 'mixtral'"),
        ({"model_type": "llama", "hidden_size": 4096, "intermediate_size": 1}, "no field moe_intermediate_size"),
        (GPT_OSS | {"experts_per_token": 2}, "num_experts_per_tok = 4, experts_per_token = 2 are names of one number"),
        (LISTS | {"moe_topk": [8, 4]}, r"moe_topk = .*differs by layer"),
        (QWEN3 | {"num_experts": "128"}, "num_experts = '128'; allowed are whole numbers from 1 to"),
        (QWEN3 | {"num_experts": True}, "num_experts = True"),
        (QWEN3 | {"num_experts": 0}, "num_experts = 0"),
        (QWEN3 | {"hidden_size": 1 << 40}, "hidden_size = "),
        (QWEN3 | {"num_hidden_layers": 10**7}, "num_hidden_layers = "),
        ([1], "holds a list"),
    ],
)
def test_config_without_a_number_is_refused_with_the_field(tmp_path: Path, config: Any, message: str) -> None:
    with pytest.raises(InvalidCase, match=message):
        resolve({"model": write(tmp_path, config)})


@pytest.mark.parametrize(
    ("fields", "layers"),
    [
        ({"mlp_only_layers": [0, 2, 50]}, 46),
        ({"moe_layers": [1, 3, "x", [4]]}, 2),
        ({"num_hidden_layers": 60_000, "mlp_only_layers": [*range(60_000, 120_000)]}, 60_000),
    ],
)
def test_layers_that_lists_name_are_counted_in_time_that_grows_with_their_sum(
    tmp_path: Path, fields: dict[str, Any], layers: int
) -> None:
    started = time.process_time()
    assert config_shape(write(tmp_path, QWEN3 | fields)).layers == layers
    assert time.process_time() - started < 5


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 100_000, b""])
def test_file_that_is_no_json_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(InvalidCase, match="cannot be read") as refused:
        resolve({"model": str(path)})
    assert "\n" not in str(refused.value)
    with pytest.raises(InvalidCase, match="cannot be read"):
        resolve({"model": str(tmp_path / "none" / "config.json")})


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("deepseek-r1", "deepseek-v3"),
        ("deepseek-ai/DeepSeek-R1-0528", "deepseek-v3"),
        ("Qwen/Qwen3-30B-A3B", "qwen3-30b-a3b"),
        ("GLM-4.6", "glm-4.5"),
    ],
)
def test_alias_and_name_on_hugging_face_are_those_of_a_preset(given: str, name: str) -> None:
    assert resolve({"model": given}).case == resolve({"model": name}).case


def test_aliases_name_presets_and_presets_have_a_source_and_a_month() -> None:
    assert set(ALIASES.values()) <= set(PRESETS)
    assert not set(ALIASES) & set(PRESETS)
    published: dict[str, ModelShape] = {name: shape for name, shape in PRESETS.items() if shape.num_experts}
    assert all(shape.source and len(shape.published) == len("2024-12") for shape in published.values())
