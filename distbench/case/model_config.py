"""The MoE layer of a model's own config.json, as Hugging Face has it, by the names of its fields.

Fields are those of the configuration classes of DeepSeek V2 to V4, Kimi-K2, GLM-4.5 to 5, Qwen3-MoE, Qwen3-Next,
Qwen3.5, Ling, Hunyuan, MiniMax-M2, gpt-oss, Mixtral and Llama-4. The model's type decides nothing: another model with
the same fields is read as well.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from distbench.case.presets import DIMENSIONS, ModelShape, preset_of
from distbench.case.table_file import open_regular
from distbench.errors import InvalidCase
from distbench.utils.text import one_line, shown

FAMILIES = (
    "DeepSeek V2 to V4, Kimi-K2, GLM-4.5 to 5, Qwen3-MoE, Qwen3-Next, Qwen3.5, Ling, Hunyuan, MiniMax-M2, gpt-oss, "
    "Mixtral, Llama-4"
)
_MOST_BYTES = 4 << 20
_MOST = 1 << 24
_NESTED = ("text_config", "language_config", "llm_config")
_FIELDS = {
    "hidden_size": ("hidden_size",),
    "num_experts": ("n_routed_experts", "num_experts", "num_local_experts"),
    "topk": ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk"),
    "intermediate_size": ("moe_intermediate_size",),
}
_DENSE_OR_NOT = "intermediate_size"
"""Of an expert in Mixtral, MiniMax-M2, gpt-oss and Llama-4; of a dense layer elsewhere."""
_SHARED = ("n_shared_experts", "num_shared_experts", "num_shared_expert")
_SHARED_SIZES = ("shared_expert_intermediate_size", "shared_intermediate_size")
_LAYERS = (
    *("num_hidden_layers", "first_k_dense_replace", "moe_layer_freq", "mlp_layer_types", "decoder_sparse_step"),
    *("mlp_only_layers", "interleave_moe_layer_step", "moe_layers", "moe_layer_num_skipped"),
)
_ABOUT_EXPERTS = re.compile(r"expert|moe|top_?k")
_WITHOUT_EFFECT = re.compile(
    r"router|aux|bias|norm|topk_(group|method)|group_top_?k|index_top_?k|^top_?k$|jitter|dtype|quant|mixed_mlp|"
    r"random_routing|drop_tokens|shared_expert_intermediate|hidden_act"
)
"""Fields about experts or a top-k that change no shape: scores, losses, groups of experts, the indexer, sampling."""


def config_values(path: str) -> dict[str, Any]:
    """Dimensions of a case, and the preset that has them as its model, from a config.json or the folder that has it.

    Raises:
        InvalidCase: it cannot be read, or lacks a field; fields about experts that are not known are named.

    """
    shape = config_shape(path)
    return {"model": preset_of(shape)} | {key: getattr(shape, key) for key in DIMENSIONS}


def config_shape(path: str) -> ModelShape:
    """Shape of the MoE layers in a config.json.

    Raises:
        InvalidCase: as `config_values`.

    """
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    config = _Config(str(file), _text_part(_read(file)))
    return ModelShape(
        hidden_size=config.number("hidden_size"),
        intermediate_size=config.intermediate_size(),
        num_experts=config.number("num_experts"),
        topk=config.number("topk"),
        layers=config.layers(),
        shared_experts=config.shared_experts(),
        source=str(file),
    )


def _read(file: Path) -> Mapping[str, Any]:
    try:
        with os.fdopen(open_regular(str(file)), "rb") as stream:
            config = msgspec.json.decode(stream.read(_MOST_BYTES))  # a longer file ends in the middle: no JSON
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        message = (
            f"model = {str(file)!r:.200}: cannot be read ({reason}); give a preset of `distbench presets`, or the "
            "config.json of a model"
        )
        raise InvalidCase(message) from error
    if not isinstance(config, dict):
        message = f"model = {str(file)!r:.200}: holds a {type(config).__name__}; a config.json has one table"
        raise InvalidCase(message)
    return config


def _text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of the language model; a model of several modalities has them in a table of their own."""
    if any(name in config for name in _FIELDS["num_experts"]):
        return config
    parts = (config[name] for name in _NESTED if isinstance(config.get(name), dict))
    return next(parts, config)


class _Config:
    """Fields of a language model's config; `path` is the file, for messages."""

    def __init__(self, path: str, fields: Mapping[str, Any]) -> None:
        self._path = path
        self._fields = {name: value for name, value in fields.items() if value is not None}
        self._dense, self._chosen = self._listed("mlp_only_layers"), self._listed("moe_layers")

    def number(self, key: str) -> int:
        """Value of a dimension by whichever of its names the config has."""
        found = {name: self._whole(name, 1) for name in _FIELDS[key] if name in self._fields}
        if not found:
            self._refuse_missing(_FIELDS[key])
        if len(set(found.values())) > 1:
            told = ", ".join(f"{name} = {value}" for name, value in found.items())
            self._refuse(f"{told} are names of one number; drop the wrong one")
        return next(iter(found.values()))

    def intermediate_size(self) -> int:
        """Intermediate columns of an expert."""
        named = "moe_intermediate_size" in self._fields
        of_expert = "num_local_experts" in self._fields or "moe_topk" in self._fields
        if not named and of_expert and _DENSE_OR_NOT in self._fields:
            return self._whole(_DENSE_OR_NOT, 1)
        return self.number("intermediate_size")

    def shared_experts(self) -> int:
        """Shared experts of a layer; a width without a number is one expert, and Llama-4 always has one."""
        for name in _SHARED:
            if name in self._fields:
                return self._whole(name, 0)
        wide = any(self._whole(name, 0) for name in _SHARED_SIZES if name in self._fields)
        return int(wide or "interleave_moe_layer_step" in self._fields)

    def layers(self) -> int:
        """Number of MoE layers; 1 where the config does not say how many layers there are."""
        if "num_hidden_layers" not in self._fields:
            return 1
        count = self._whole("num_hidden_layers", 1)
        if count > _MOST >> 8:
            self._refuse(f"num_hidden_layers = {count}; allowed are up to {_MOST >> 8}")
        return max(sum(self._is_sparse(index) for index in range(count)), 1)

    def _is_sparse(self, index: int) -> bool:
        kinds, frequency = self._fields.get("mlp_layer_types"), self._fields.get("moe_layer_freq")
        if isinstance(kinds, list) and index < len(kinds):
            return str(kinds[index]) == "sparse"
        if isinstance(frequency, list) and index < len(frequency):
            return bool(frequency[index])
        if self._chosen is not None:
            return index in self._chosen
        first = self._step("first_k_dense_replace", 0) + self._step("moe_layer_num_skipped", 0)
        return (
            index >= first
            and index not in (self._dense or ())
            and index % (self._step("moe_layer_freq", 1) or 1) == 0
            and (index + 1) % (self._step("decoder_sparse_step", 1) or 1) == 0
            and (index + 1) % (self._step("interleave_moe_layer_step", 1) or 1) == 0
        )

    def _listed(self, name: str) -> frozenset[int] | None:
        """Layers that a list names; None where there is no list."""
        value = self._fields.get(name)
        return frozenset(one for one in value if isinstance(one, int)) if isinstance(value, list) else None

    def _step(self, name: str, default: int) -> int:
        value = self._fields.get(name, default)
        return default if isinstance(value, list) else self._whole(name, 0) if name in self._fields else default

    def _whole(self, name: str, least: int) -> int:
        """A whole number; a list of one for each layer is that number where all are the same."""
        value = self._fields[name]
        if isinstance(value, list) and value and all(one == value[0] for one in value):
            value = value[0]
        elif isinstance(value, list):
            self._refuse(f"{name} = {shown(value)} differs by layer; a case is one layer: give its number")
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MOST:
            self._refuse(f"{name} = {shown(value)}; allowed are whole numbers from {least} to {_MOST}")
        return int(value)

    def _refuse_missing(self, names: tuple[str, ...]) -> NoReturn:
        read = {*_SHARED, *_SHARED_SIZES, *_LAYERS, _DENSE_OR_NOT, *(name for key in _FIELDS.values() for name in key)}
        unknown = sorted(
            name
            for name in self._fields
            if name not in read and _ABOUT_EXPERTS.search(name) and not _WITHOUT_EFFECT.search(name)
        )
        told = f"; not known here: {', '.join(unknown)}" if unknown else ""
        kind = self._fields.get("model_type", "none given")
        self._refuse(
            f"no field {' or '.join(names)}{told} (model_type {shown(kind)}; known are {FAMILIES}); give --model "
            "custom with all dimensions"
        )

    def _refuse(self, reason: str) -> NoReturn:
        message = f"model = {self._path!r:.200}: {reason}"
        raise InvalidCase(message)
