"""Keys of shared and replicated experts: tables, what fits the ranks, and the hash of cases without them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distbench.case.identity import case_hash, case_values
from distbench.case.placement import experts_in_slots, read_placement
from distbench.case.resolve import FLAGS, Layer, resolve_case
from distbench.case.spec import SHAPE_KEYS, Case
from distbench.errors import InvalidCase

RANKS = 4
TABLE = (0, 1, 2, 3, 4, 5, 5, 5)


def case_of(**keys: Any) -> Case:
    return resolve_case([Layer("test", {"model": "tiny", "fp8_format": "e4m3fn"} | keys)], RANKS).case


@pytest.mark.parametrize(
    ("keys", "digest"),
    [
        ({}, "96bb8a996cc4b84b808e53a07b0ac6227aba345b3ccacd2aa2cc1d5fc1acb09c"),
        (
            {"model": "deepseek-v3", "profile": "sglang-epv1-decode", "tokens": 7},
            "25adf8253da1072f8bd25f555836a1d69aad5e2c71c2aba6ad427be153dd04cb",
        ),
        (
            {"model": "tiny-odd", "tokens": [0, 3, 9, 2], "routing": "hot-rank:1"},
            "a2db558689aca8fc1b44c19d4bc54ff1dd03fc2dc14013d30cf0235dc70d45c1",
        ),
    ],
)
def test_case_without_keys_of_a_shape_has_the_hash_that_it_had_before_there_were_any(
    keys: dict[str, Any], digest: str
) -> None:
    case = case_of(**keys)
    assert case_hash(case) == digest
    assert not case_values(case).keys() & set(SHAPE_KEYS)


@pytest.mark.parametrize(
    "keys",
    [
        {"shared_experts": 1},
        {"physical_experts": 32},
        {"num_experts": 6, "topk": 2, "placement": TABLE},
        {"dropped_slots": 0.25},
        {"dropped_tokens": 0.5},
    ],
)
def test_each_key_of_a_shape_is_in_the_case_and_changes_its_hash(keys: dict[str, Any]) -> None:
    case = case_of(**keys)
    assert case_values(case).keys() >= keys.keys()
    assert case_hash(case) != case_hash(case_of())


def test_ranks_hold_their_slots_of_routed_experts_and_the_shared_ones() -> None:
    case = case_of(num_experts=6, topk=2, placement=TABLE, shared_experts=2)
    assert (case.experts_per_rank, case.placed_experts, case.topk_slots) == (4, 16, 4)
    assert case.physical_experts == len(TABLE)


def test_table_that_says_what_no_table_says_is_the_same_case() -> None:
    assert case_of(placement=tuple(range(16))) == case_of()
    assert case_of(physical_experts=16) == case_of()
    assert case_of(placement=tuple(slot % 16 for slot in range(32))) == case_of(physical_experts=32)
    assert experts_in_slots(3, 8, ()) == (0, 1, 2, 0, 1, 2, 0, 1)


def test_tables_are_read_from_json_npy_and_text(tmp_path: Path) -> None:
    def written(name: str, content: Any) -> str:
        path = tmp_path / name
        if path.suffix == ".npy":
            np.save(path, np.array(content, dtype=np.int32))
        else:
            path.write_text(json.dumps(content))
        return str(path)

    other = (5, 4, 3, 2, 1, 0, 0, 0)
    assert read_placement("0, 1,2,3,4,5,5,5") == TABLE
    assert read_placement(written("one.json", TABLE)) == TABLE
    assert read_placement(written("one.npy", TABLE)) == TABLE
    assert read_placement(written("layers.npy", [TABLE, other]) + "@1") == other
    sglang = written("sglang.json", {"physical_to_logical_map": [TABLE, other]})
    assert read_placement(f"{sglang}@0") == TABLE
    flags = Layer(FLAGS, {"model": "tiny", "num_experts": "6", "topk": "2", "placement": f"{sglang}@1"}, strict=False)
    assert resolve_case([flags], RANKS).case.placement == other
    with pytest.raises(InvalidCase, match=r"has 2 layers; name one: .*sglang.json@0"):
        read_placement(sglang)
    with pytest.raises(InvalidCase, match="has 2 layers; name one of 0 to 1"):
        read_placement(f"{sglang}@2")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("text.json", b"no JSON"),
        ("words.json", b'["a"]'),
        ("negative.json", b"[0, -1]"),
        ("half.json", b"[0.5]"),
        ("table.json", b'{"other": [1]}'),
        ("deep.json", b"[" * 100_000),
        ("pickle.npy", b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }" + b" " * 60),
        ("empty.npy", b""),
    ],
)
def test_file_that_is_no_table_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InvalidCase, match="cannot be read"):
        read_placement(str(path))


@pytest.mark.parametrize("content", ["[]", "[[]]", '{"physical_to_logical_map": []}'])
@pytest.mark.parametrize("layer", ["", "@0"])
def test_table_without_slots_is_refused_and_not_taken_for_none(tmp_path: Path, content: str, layer: str) -> None:
    path = tmp_path / "empty.json"
    path.write_text(content)
    with pytest.raises(InvalidCase, match="lists no slot; give the expert of each"):
        read_placement(f"{path}{layer}")


def test_pickle_is_refused_without_numpys_advice_to_load_it(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(b"\x80\x04]q.")
    with pytest.raises(InvalidCase, match="pickled objects, which are never loaded"):
        read_placement(str(path))


def test_missing_file_is_refused() -> None:
    with pytest.raises(InvalidCase, match="No such file"):
        read_placement("nowhere.json")


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"num_experts": 17}, "use 16 experts, or --num-experts 16 --shared-experts 1 if 1 of them is shared"),
        ({"num_experts": 17}, "or --physical-experts 20 if some are replicated"),
        ({"num_experts": 18}, "--shared-experts 2 if 2 of them are shared"),
        ({"num_experts": 19}, "not divisible by 4 ranks; use 16 experts, or --physical-experts 20"),
        ({"num_experts": 3, "topk": 2}, "use 4 experts, or --physical-experts 4"),
        ({"physical_experts": 18}, "give a multiple of 4 from 16 to"),
        ({"physical_experts": 12}, "give a multiple of 4 from 16 to"),
        ({"num_experts": 6, "topk": 2, "placement": TABLE[:7]}, "physical_experts = 7: 4 ranks share"),
        ({"num_experts": 6, "topk": 2, "placement": (0, 1, 2, 3, 4, 6, 5, 5)}, "expert 6 in it; give each"),
        ({"num_experts": 6, "topk": 2, "placement": (0, 1, 2, 3, 5, 5, 5, 5)}, "expert 4 in no slot; give each"),
        ({"num_experts": 6, "topk": 2, "placement": TABLE, "physical_experts": 12}, "placement lists 8 slots"),
        ({"num_experts": 3, "topk": 4, "physical_experts": 4}, "topk = 4: above num_experts = 3"),
        ({"dropped_slots": 1.5}, "dropped_slots = 1.5"),
        ({"caller": "vllm", "experts": "aiter", "emulate": True, "shared_experts": 1}, "vLLM refuses fused shared"),
    ],
)
def test_keys_that_do_not_fit_are_refused_with_what_would(keys: dict[str, Any], told: str) -> None:
    if "caller" in keys:
        keys = dict(keys)
        layers = [Layer(FLAGS, {"caller": keys.pop("caller")}), Layer("test", {"model": "tiny"} | keys)]
        with pytest.raises(InvalidCase, match=told):
            resolve_case(layers, RANKS)
        return
    with pytest.raises(InvalidCase, match=told):
        case_of(**keys)
