"""Recorded hidden states: written, read back bit for bit, used by gaussian inputs alone, and refused where damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from distbench.errors import InvalidCase
from distbench.launcher.preflight import check_case
from distbench.pipeline.inputs import workload_for
from distbench.workload.quantize import dequantize, fp8_dtype, quantize_fp8_blocks
from distbench.workload.routing_spec import recorded_notes
from distbench.workload.trace_file import Header, Slice, read_header, read_slice, read_tensors, trace_bytes
from distbench.workload.trace_tensors import Tensors, bad_tensors
from tests.cases import tiny_case

E, K, W, H = 16, 4, 4, 256
COUNTS = (2, 0, 5, 3)
LAYER: dict[str, Any] = {"model": "custom", "hidden_size": H, "intermediate_size": 128, "num_experts": E, "topk": K}


def rows() -> torch.Tensor:
    drawn = np.random.default_rng(1).standard_t(2, (sum(COUNTS), H))
    drawn[3] = 0
    return torch.from_numpy(drawn).bfloat16()


def tensors(kind: str, *, cut: int = 4) -> Tensors:
    if kind == "bf16":
        bits = rows().view(torch.int16).numpy().view(np.uint16)
        return Tensors(kind, (bits[:cut], bits[cut:]))
    made, scales = quantize_fp8_blocks(rows(), getattr(torch, f"float8_{kind}"))
    words, blocks = made.view(torch.uint8).numpy(), scales.numpy()
    return Tensors(kind, (words[:cut], words[cut:]), (blocks[:cut], blocks[cut:]))


def trace(path: Path, kind: str, **header: Any) -> str:
    ids = np.random.default_rng(2).random((sum(COUNTS), E)).argsort(axis=1)[:, :K].astype(np.int32)
    one = Slice(ids, np.array(COUNTS, dtype=np.int64))
    slices = {(7, 3): one._replace(tensors=tensors(kind)), (7, 4): one}
    path.write_bytes(trace_bytes(Header("", E, K, W, "here", {}, **header), slices))
    return str(path)


@pytest.mark.parametrize("kind", ["bf16", "e4m3fn", "e4m3fnuz"])
def test_bits_come_back_of_the_slices_that_have_them(tmp_path: Path, kind: str) -> None:
    header = read_header(trace(tmp_path / "a.safetensors", kind))
    assert (header.hidden, header.hidden_size, header.recorded) == (kind, H, frozenset({(7, 3)}))
    assert read_slice(header, 7, 3).tensors is None
    assert read_tensors(header, 7, 4, 10) is None
    found, sent = read_tensors(header, 7, 3, 10), tensors(kind)
    assert found is not None
    assert (found.parts[0] == np.concatenate(sent.parts)).all()
    assert kind == "bf16" or (found.scales[0] == np.concatenate(sent.scales)).all()
    assert found.size == sent.size


@pytest.mark.parametrize("kind", ["e4m3fn", "e4m3fnuz"])
def test_magnitudes_of_fp8_are_those_of_torch(kind: str) -> None:
    words = np.arange(256, dtype=np.uint8).reshape(256, 1).repeat(128, axis=1)
    values = torch.from_numpy(words).view(fp8_dtype(kind)).float()[:, 0].abs()  # type: ignore[arg-type]
    for word, value in zip(words, values.tolist(), strict=True):
        bad = bad_tensors(Tensors(kind, (word[None],), (np.full((1, 1), 2.0**20, np.float32),)))
        assert bool(bad) == (not value <= 1)


@pytest.mark.parametrize("kind", ["bf16", "e4m3fn"])
def test_gaussian_inputs_take_them_and_exact_ones_keep_their_own(tmp_path: Path, kind: str) -> None:
    dtype = "bf16" if kind == "bf16" else "fp8"
    values = LAYER | {"tokens": COUNTS, "dispatch_dtype": dtype, "fp8_format": "e4m3fn"}
    with_hidden = trace(tmp_path / "a.safetensors", kind)
    first = 0
    for rank, count in enumerate(COUNTS):
        for numerics in ("gaussian", "exact"):
            both = [
                workload_for(tiny_case(W, **values, routing=f"trace:{with_hidden}@7.{layer}", numerics=numerics), "cpu")  # type: ignore[arg-type]
                for layer in (3, 4)
            ]
            recorded, generated = (one.tokens(rank) for one in both)
            assert [one.recorded for one in both] == [numerics == "gaussian", False]
            assert torch.equal(recorded.ids, generated.ids)
            if numerics == "exact":
                assert torch.equal(recorded.hidden.view(torch.uint8), generated.hidden.view(torch.uint8))
            elif kind == "bf16":
                assert torch.equal(recorded.hidden, rows()[first : first + count])
            else:
                made, scales = quantize_fp8_blocks(rows()[first : first + count], torch.float8_e4m3fn)
                assert torch.equal(recorded.hidden.view(torch.uint8), made.view(torch.uint8))
                assert recorded.scales is not None
                assert torch.equal(recorded.scales, scales)
        first += count


def test_bf16_is_quantised_for_a_dispatch_of_fp8_and_padded_where_the_layer_is(tmp_path: Path) -> None:
    routing = f"trace:{trace(tmp_path / 'a.safetensors', 'bf16')}@7.3"
    values = LAYER | {"tokens": COUNTS, "routing": routing, "numerics": "gaussian"}
    batch = workload_for(tiny_case(W, **values, dispatch_dtype="fp8"), torch.device("cpu")).tokens(2)
    assert torch.equal(batch.scales, quantize_fp8_blocks(rows()[2:7], batch.hidden.dtype)[1])  # type: ignore[arg-type]
    assert (dequantize(batch.hidden, batch.scales) - rows()[2:7].float()).abs().max() < rows()[2:7].abs().max() / 16
    padded = tiny_case(W, **values | {"hidden_size": H + 128, "hidden_pad": 128})
    hidden = workload_for(padded, torch.device("cpu")).tokens(2).hidden
    assert torch.equal(hidden[:, :H], rows()[2:7])
    assert not hidden[:, H:].any()


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("bf16", {"hidden_size": 512}, "hidden_size = 512, recorded hidden states have 256; give what was recorded"),
        ("e4m3fn", {}, "dispatch of bf16, recorded hidden states are fp8 of format e4m3fn"),
        ("e4m3fnuz", {"dispatch_dtype": "fp8", "fp8_format": "e4m3fn"}, "recorded hidden states are fp8 of format"),
        ("bf16", {"transport": "mori", "emulate": True, "combine_quant": "fp8_direct_cast"}, "combine_quant = fp8_dir"),
    ],
)
def test_case_of_other_hidden_states_is_refused_unless_its_inputs_are_exact(
    tmp_path: Path, kind: str, values: dict[str, Any], message: str
) -> None:
    keys = LAYER | {"tokens": COUNTS, "routing": f"trace:{trace(tmp_path / 'a.safetensors', kind)}@7.3"} | values
    for numerics in ("gaussian", "both"):
        with pytest.raises(InvalidCase, match=message):
            check_case(tiny_case(W, **keys, numerics=numerics))
    check_case(tiny_case(W, **keys, numerics="exact"))


def test_note_says_that_tokens_are_recorded_and_experts_generated(tmp_path: Path) -> None:
    routing = f"trace:{trace(tmp_path / 'a.safetensors', 'bf16')}"
    keys = LAYER | {"tokens": COUNTS}
    told = "gaussian inputs are recorded tokens with generated experts: bf16 hidden states of trace:"
    assert [
        note.startswith(told) for note in recorded_notes(tiny_case(W, **keys, routing=routing, numerics="both"))
    ] == [True]
    assert not recorded_notes(tiny_case(W, **keys, routing=routing))
    assert not recorded_notes(tiny_case(W, **keys, routing=f"{routing}@7.4", numerics="both"))


def damaged(path: Path, kind: str, damage: str) -> str:
    content, header = load_file(trace(path, kind)), read_header(str(path))
    metadata = {"format": "distbench-trace", "version": "1", "num_experts": "16", "topk": "4", "ep_size": "4"}
    metadata |= {"hidden": header.hidden, "hidden_size": str(header.hidden_size)}
    hidden = content["hidden.7.3"]
    words = {"nan": 0x7FC0 if kind == "bf16" else 0x7F, "infinite": 0xFF80, "large": 0x4981}
    described = {"kind": {"hidden": "e5m2"}, "size": {"hidden_size": "1000000"}, "block": {"hidden_size": "200"}}
    scales = {"negative scale": -1, "nan scale": np.nan}
    if damage in words:
        hidden[4, 9] = words[damage]
    elif damage in described:
        metadata |= described[damage]
    elif damage in scales:
        content["scales.7.3"][4, 1] = scales[damage]
    elif damage == "small":
        hidden[4] = 0x0001
    elif damage == "no size":
        del metadata["hidden_size"]
    elif damage == "no scales":
        del content["scales.7.3"]
    else:
        cut = {"rows": hidden[1:], "dtype": hidden.astype(np.int32), "scales": content.get("scales.7.3", hidden)[:, :1]}
        content["scales.7.3" if damage == "scales" else "hidden.7.3"] = np.ascontiguousarray(cut[damage])
    save_file(content, path, metadata)
    return str(path)


@pytest.mark.parametrize(
    ("kind", "damage", "message"),
    [
        ("bf16", "rows", r"hidden.7.3 is U16 \[9, 256\], the format has U16 \[10, 256\]"),
        ("bf16", "dtype", r"hidden.7.3 is I32 \[10, 256\]"),
        ("bf16", "nan", "step 7, layer 3: token 4 has a hidden state of at most nan: allowed are finite"),
        ("bf16", "infinite", "token 4 has a hidden state of at most inf"),
        ("bf16", "large", "token 4 has a hidden state of at most"),
        ("bf16", "small", "token 4 has a hidden state of at most"),
        ("e4m3fn", "nan", "token 4 has a hidden state of at most nan"),
        ("e4m3fn", "no scales", "scales.7.3 is None None, the format has F32"),
        ("e4m3fn", "scales", r"scales.7.3 is F32 \[10, 1\], the format has F32 \[10, 2\]"),
        ("e4m3fn", "negative scale", "token 4 has a hidden state of at most nan"),
        ("e4m3fn", "nan scale", "token 4 has a hidden state of at most nan"),
        ("bf16", "kind", "hidden states 'e5m2' of 256 columns; allowed are bf16, e4m3fn, e4m3fnuz"),
        ("bf16", "size", "hidden states 'bf16' of 1000000 columns; allowed are"),
        ("e4m3fn", "block", "hidden states 'e4m3fn' of 200 columns; allowed are"),
        ("bf16", "no size", "hidden_size = '' in its metadata"),
    ],
)
def test_damaged_hidden_states_are_refused_with_their_place(
    tmp_path: Path, kind: str, damage: str, message: str
) -> None:
    path = damaged(tmp_path / "a.safetensors", kind, damage)
    with pytest.raises(InvalidCase, match=message):
        read_tensors(read_header(path), 7, 3, 10)
