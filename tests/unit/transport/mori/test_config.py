"""Configuration of MoRI from a case: the kernel of production, and refusals with value, bound and fix."""

from __future__ import annotations

import re
from typing import Any

import pytest

from distbench.case.spec import Case
from distbench.errors import InvalidCase, Unsupported
from distbench.launcher.preflight import check_case
from distbench.transport.mori.config import Launch, check_environment, heap_size, mori_warnings, plan_mori
from distbench.transport.mori.emulated.quirks import QUIRKS, parse_quirks
from tests.cases import tiny_case


def case_of(ranks: int = 8, **values: Any) -> Case:
    return tiny_case(ranks, transport="mori", emulate=True, **values)


@pytest.mark.parametrize(
    ("ranks", "values", "kernel", "launch"),
    [
        (2, {}, "IntraNode", Launch(80, 0, 16)),
        (8, {}, "IntraNode", Launch(80, 0, 16)),
        (16, {}, "InterNodeV1LL", Launch(64, 32, 8)),
        (16, {"max_dispatch_tokens_per_rank": 256}, "InterNodeV1LL", Launch(64, 32, 8)),
        (16, {"max_dispatch_tokens_per_rank": 257}, "InterNodeV1", Launch(64, 32, 8)),
        (16, {"inter_kernel_switch": 63}, "InterNodeV1", Launch(64, 32, 8)),
        (16, {"mori_kernel": "AsyncLL"}, "AsyncLL", Launch(64, 32, 8)),
        (128, {"mori_kernel": "AsyncLL"}, "AsyncLL", Launch(128, 32, 8)),
        (8, {"gpu_per_node": 4}, "InterNodeV1LL", Launch(64, 32, 8)),
        (8, {"mori_kernel": "IntraNodeLL"}, "IntraNodeLL", Launch(80, 0, 16)),
    ],
)
def test_kernel_and_launch_geometry_are_those_of_production(
    ranks: int, values: dict[str, Any], kernel: str, launch: Launch
) -> None:
    plan = plan_mori(case_of(ranks, tokens=1, **values), {})
    assert (plan.kernel, plan.launch) == (kernel, launch)
    assert 0 <= plan.launch.rdma_blocks < plan.launch.blocks
    assert plan.launch.rdma_blocks % 8 == 0


@pytest.mark.parametrize(
    ("ranks", "values", "message"),
    [
        (3, {}, "gpu_per_node = 3: MoRI takes a power of two that divides the 3 ranks"),
        (12, {}, "gpu_per_node = 8: .* divides the 12 ranks"),
        (8, {"gpu_per_node": 4, "mori_kernel": "IntraNode"}, "8 ranks on 2 nodes"),
        (16, {"gpu_per_node": 16, "mori_kernel": "IntraNode"}, "16 ranks on 1 nodes"),
        (8, {"topk": 9, "mori_kernel": "IntraNodeLL"}, "topk = 9: IntraNodeLL loses the slots past 8"),
        (8, {"gpu_per_node": 1, "topk": 4}, "has room for as many nodes, the case has 8"),
        (32, {"topk": 64, "gpu_per_node": 8}, "MoRI's kernels take up to 63"),
        (8, {"gpu_per_node": 4, "combine_quant": "fp8_blockwise"}, "fp8_blockwise: not with InterNodeV1LL"),
        (8, {"mori_kernel": "AsyncLL", "combine_quant": "fp4_blockwise"}, "fp4_blockwise: not with AsyncLL"),
        (8, {"combine_input": "registered", "combine_quant": "fp8_direct_cast"}, "use combine_input = external"),
        *(
            (
                8,
                {"mori_kernel": kernel, "combine_input": "registered"},
                f"registered: {kernel} stages rows in that very",
            )
            for kernel in ("InterNodeV1", "InterNodeV1LL", "AsyncLL")
        ),
        (8, {"prealloc_max_recv_tokens": 64}, "combine buffer has 35072 bytes, IntraNode writes up to byte 237568"),
    ],
)
def test_configuration_that_mori_would_corrupt_is_refused(ranks: int, values: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidCase, match=message):
        plan_mori(case_of(ranks, **({"tokens": 16} | values)), {})


@pytest.mark.parametrize(
    "values",
    [
        {"prealloc_max_recv_tokens": 64, "combine_input": "registered"},
        {"prealloc_max_recv_tokens": 512},
        {"prealloc_max_recv_tokens": 300, "combine_quant": "fp8_direct_cast"},
        {"prealloc_max_recv_tokens": 64, "mori_kernel": "AsyncLL"},
    ],
)
def test_safe_receive_cap_is_passed_to_mori(values: dict[str, Any]) -> None:
    plan = plan_mori(case_of(tokens=8, **values), {})
    assert plan.max_total_recv_tokens == values["prealloc_max_recv_tokens"]


@pytest.mark.parametrize(
    ("local_ranks", "kernel", "nodes"),
    [
        (8, "IntraNode", 1),
        (4, "InterNodeV1LL", 2),
        (2, "InterNodeV1LL", 4),
        (16, "IntraNode", 1),
        (None, "IntraNode", 1),
    ],
)
@pytest.mark.parametrize("emulate", [False, True])
def test_ranks_per_node_are_those_of_the_launch(
    emulate: bool, local_ranks: int | None, kernel: str, nodes: int
) -> None:
    plan = plan_mori(tiny_case(8, transport="mori", emulate=emulate), {}, local_ranks)
    assert (plan.kernel, plan.nodes, plan.gpu_per_node) == (kernel, nodes, 8 // nodes)


def test_gpu_per_node_that_differs_from_the_launch_requires_emulation() -> None:
    case = tiny_case(8, transport="mori", gpu_per_node=8)
    with pytest.raises(InvalidCase, match=r"gpu_per_node = 8: the launch has 4 of the case's ranks on each node"):
        plan_mori(case, {}, 4)
    assert plan_mori(case, {}, 8).nodes == 1
    assert plan_mori(case_of(gpu_per_node=8), {}, 4).nodes == 1
    with pytest.raises(InvalidCase, match=r"gpu_per_node = 6: MoRI takes a power of two"):
        plan_mori(tiny_case(12, transport="mori"), {}, 6)


def test_exact_case_with_fp4_combine_is_refused() -> None:
    with pytest.raises(InvalidCase, match=r"fp4_blockwise: .*use numerics = gaussian"):
        check_case(case_of(combine_quant="fp4_blockwise"))
    with pytest.raises(InvalidCase, match=r"topk = 17: .* 16 units up to topk = 16"):
        check_case(case_of(combine_quant="fp8_direct_cast", topk=17, num_experts=64))


def test_heap_is_sized_for_the_case_and_a_smaller_one_is_refused() -> None:
    plan = plan_mori(case_of(), {})
    assert heap_size(plan, {}, emulated=False) == 4 << 30
    assert plan.heap_bytes <= heap_size(plan, {}, emulated=True) < 2 * plan.heap_bytes + (64 << 20)
    assert heap_size(plan, {"MORI_SHMEM_HEAP_SIZE": "6G"}, emulated=False) == 6 << 30
    assert heap_size(plan, {"MORI_SHMEM_HEAP_SIZE": "512MiB"}, emulated=False) == 512 << 20
    with pytest.raises(InvalidCase, match=rf"1M: 1048576 bytes, the case needs {plan.heap_bytes}"):
        heap_size(plan, {"MORI_SHMEM_HEAP_SIZE": "1M"}, emulated=False)
    assert heap_size(plan, {"MORI_SHMEM_HEAP_SIZE": ""}, emulated=False) == 4 << 30
    large = plan_mori(case_of(model="deepseek-v3", max_dispatch_tokens_per_rank=8192, tokens=1), {})
    assert heap_size(large, {}, emulated=False) > 2 * 65536 * 7168 * 2


def as_mori_reads(text: str) -> int:
    """Bytes that `ParseSizeString` of MoRI's init.cpp (C++) reads from `text`."""
    units = {"G": 30, "M": 20, "K": 10}
    known = {f"{unit}iB": shift for unit, shift in units.items()} | {f"{unit.lower()}ib": units[unit] for unit in units}
    for unit, shift in units.items():
        known |= dict.fromkeys((f"{unit}B", f"{unit.lower()}b", f"{unit}b", unit, unit.lower()), shift)
    for length in (3, 2, 1):
        if text[-length:] in known:
            return int(re.match(r"[0-9]+", text[:-length])[0]) << known[text[-length:]]  # type: ignore[index]
    return int(re.match(r"[0-9]+", text)[0])  # type: ignore[index]


@pytest.mark.parametrize("letter", ["", *"KMGTkmgt"])
@pytest.mark.parametrize("ending", ["", "B", "b", "iB", "ib", "IB", "Ib", " ", "x"])
def test_heap_size_text_is_parsed_as_mori_parses_it_or_refused(letter: str, ending: str) -> None:
    plan, text = plan_mori(case_of(), {}), f"8000000000{letter}{ending}"
    whole = {letter + ending for letter in "KMG" for ending in ("", "B", "b", "iB")}
    whole |= {letter + ending for letter in "kmg" for ending in ("", "b", "ib")} | {""}
    if letter + ending in whole:
        assert heap_size(plan, {"MORI_SHMEM_HEAP_SIZE": text}, emulated=False) == as_mori_reads(text)
        return
    with pytest.raises(InvalidCase, match=r"no size; write for instance 6G: MoRI knows K, KB, Kb, KiB"):
        heap_size(plan, {"MORI_SHMEM_HEAP_SIZE": text}, emulated=False)


def test_settings_that_are_not_pinned_give_a_warning() -> None:
    plan = plan_mori(case_of(mori_kernel="AsyncLL", launch_mode="AUTO"), {})
    found = mori_warnings(plan, {"MORI_SHMEM_MODE": "vmm_heap"}, emulated=False)
    assert [warning.split()[0] for warning in found] == ["MORI_SHMEM_MODE=vmm_heap:", "launch_mode", "mori_kernel"]
    assert mori_warnings(plan_mori(case_of(), {}), {}, emulated=False) == ()


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"MORI_SHMEM_MODE": "ISOLATION"}, ""),
        ({"MORI_SHMEM_MODE": "isolation", "MORI_SHMEM_HEAP_SIZE": "1K"}, ""),
        ({"MORI_SHMEM_MODE": "STATIC_HEAP"}, ""),
        ({"MORI_SHMEM_MODE": "VMM_HEAP"}, "vmm_heap has corrupted rows on ROCm 7.2"),
        ({"MORI_SHMEM_MODE": "Isolation"}, "falls back to static_heap"),
        ({"MORI_ENABLE_SDMA": "True"}, ""),
        ({"MORI_ENABLE_SDMA": "on"}, "SGLang reads true and 1 only"),
        ({"MORI_ENABLE_SDMA": "yes"}, "SGLang reads true and 1 only"),
        ({"MORI_ENABLE_SDMA": "off"}, ""),
    ],
)
def test_mori_variables_are_parsed_as_mori_parses_them(environ: dict[str, str], words: str) -> None:
    found = mori_warnings(plan_mori(case_of(), environ), environ, emulated=False)
    assert bool(found) == bool(words)
    assert words in "".join(found)


def test_heap_size_is_not_checked_in_isolation_mode() -> None:
    plan, small = plan_mori(case_of(), {}), {"MORI_SHMEM_HEAP_SIZE": "1K"}
    assert heap_size(plan, small | {"MORI_SHMEM_MODE": "ISOLATION"}, emulated=True) >= plan.heap_bytes
    with pytest.raises(InvalidCase, match="1024 bytes, the case needs"):
        heap_size(plan, small | {"MORI_SHMEM_MODE": "Isolation"}, emulated=True)


@pytest.mark.parametrize("word", ["1", "True", "on", "yes"])
def test_any_true_word_of_mori_enables_sdma_for_asyncll(word: str) -> None:
    plan = plan_mori(case_of(mori_kernel="AsyncLL"), {})
    found = mori_warnings(plan, {"MORI_ENABLE_SDMA": word}, emulated=False)
    assert "copies by compute units" not in "".join(found)
    assert "copies by compute units" in "".join(mori_warnings(plan, {"MORI_ENABLE_SDMA": "no"}, emulated=False))


def test_mori_communication_backend_cco_is_unsupported() -> None:
    with pytest.raises(Unsupported, match=r"MORI_EP_COMM = 'cco'"):
        check_environment({"MORI_EP_COMM": "cco"})


def test_missing_mori_is_unsupported_without_emulate() -> None:
    with pytest.raises(Unsupported, match=r"install amd-mori .* or add --emulate"):
        check_case(tiny_case(4, transport="mori"))
    assert tiny_case(4, transport="mori").stand_ins == ["reference for aiter"]
    assert "distbench.transport.mori.emulated for mori" in case_of().stand_ins


def test_quirks_are_parsed_from_a_release_and_from_names() -> None:
    assert parse_quirks("") == parse_quirks("1.2.4") == frozenset()
    assert parse_quirks("1.2.2, ll-all-slots") < set(QUIRKS)
    with pytest.raises(ValueError, match=r"neither a release"):
        parse_quirks("1.2.3")
