"""Cases that cannot run are refused with numbers and a fix before any rank starts."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from distbench.case.entry import Entry
from distbench.cli import launching, main
from distbench.errors import InvalidCase, Unsupported
from distbench.launcher import memory, preflight
from distbench.launcher.memory import available_bytes, check_device_memory, check_memory, device_bytes, memory_bytes
from distbench.launcher.preflight import check_case, check_folder, check_path
from tests.cases import tiny_case

GIB = 1 << 30


def entry(name: str, **values: Any) -> Entry:
    return Entry(name=name, case=tiny_case(2, **values), sources={})


class Usage(NamedTuple):
    """Result of shutil.disk_usage."""

    total: int
    used: int
    free: int


@pytest.fixture
def no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    def start() -> None:
        pytest.fail("ranks were started")

    monkeypatch.setattr(launching, "preload_ranks", start)


@pytest.fixture
def free_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Setter of a disk's free bytes."""

    def leave(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(free, 0, free))

    return leave


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of the control group's files, empty."""
    monkeypatch.setattr(memory, "_GROUP", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"transport": "mori", "emulate": True, "fp8_format": "e4m3fn"}, "has 304 compute units, so it is a gfx942, "),
        ({"experts": "aiter", "emulate": True, "cu_count": 256, "fp8_format": "e4m3fnuz"}, "kernels have e4m3fn; "),
        ({"experts": "triton", "fp8_format": "e4m3fnuz"}, "with experts triton: their kernels compute e4m3fn"),
    ],
)
def test_fp8_format_without_kernels_is_unsupported(values: dict[str, Any], message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        check_case(tiny_case(dispatch_dtype="fp8", **values))
    check_case(tiny_case(**values))


def test_host_memory_is_checked_against_the_largest_case() -> None:
    small, large = entry("small"), entry("large", max_dispatch_tokens_per_rank=1 << 20)
    needed = memory_bytes(large.case)
    check_memory([small, large, small], needed)
    check_memory([small], memory_bytes(small.case))
    with pytest.raises(Unsupported) as caught:
        check_memory([small, large, small], needed - 1)
    told = f"memory: case large needs about {needed} bytes for 2 ranks ({needed / GIB:.1f} GiB), {needed - 1} are"
    assert str(caught.value).startswith(told)
    assert caught.value.exit_code == 77


def test_estimated_memory_grows_with_every_dimension() -> None:
    base = memory_bytes(tiny_case(2))
    for change in (
        {"max_dispatch_tokens_per_rank": 128},
        {"num_experts": 32},
        {"intermediate_size": 256},
        {"tokens": 64},
    ):
        assert memory_bytes(tiny_case(2, **change)) > base
    assert memory_bytes(tiny_case(4)) > base
    overlapped, received = tiny_case(2, two_batch_overlap=True), tiny_case(2).capacity * tiny_case(2).hidden_size
    assert memory_bytes(overlapped) > base + 2 * 2 * 2 * received
    assert device_bytes(overlapped) > device_bytes(tiny_case(2)) + 2 * 2 * received
    assert memory_bytes(tiny_case(2, dispatch_dtype="fp8")) < base


def test_estimated_memory_counts_the_measuring_of_errors() -> None:
    exact, both, gaussian = (
        memory_bytes(tiny_case(2, numerics=kind, num_experts=2, topk=1)) for kind in ("exact", "both", "gaussian")
    )
    assert both == gaussian > exact


@pytest.mark.parametrize(
    ("limit", "used", "files", "expected"), [(1000, 400, 0, 600), (1000, 900, 300, 400), (1000, 1000, 0, 0)]
)
def test_available_memory_is_what_the_control_group_leaves(
    group: Path, limit: int, used: int, files: int, expected: int
) -> None:
    of_the_machine = available_bytes()
    (group / "memory.current").write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"anon 5\nactive_file {files // 3}\ninactive_file {files - files // 3}\n")
    (group / "memory.max").write_text("max\n")
    assert available_bytes() > of_the_machine / 2
    (group / "memory.max").write_text(f"{limit}\n")
    assert available_bytes() == expected


def test_device_memory_is_checked_against_the_largest_case() -> None:
    triton = {"experts": "triton"}
    small, large = entry("small", **triton), entry("large", max_dispatch_tokens_per_rank=1 << 16, **triton)
    on_cpu = entry("large", max_dispatch_tokens_per_rank=1 << 16, device="cpu", **triton)
    needed = device_bytes(large.case)
    check_device_memory([small, large], ("cuda:0", "cuda:1"), needed)
    check_device_memory([small, on_cpu], ("cuda:0",), needed - 1)
    check_device_memory([large], (), 0)
    with pytest.raises(Unsupported) as caught:
        check_device_memory([small, large], ("cuda:0", "cuda:1"), needed - 1)
    told = f"device memory: case large needs at least {needed} bytes on each device"
    assert str(caught.value).startswith(told)
    assert f"{needed - 1} are free on the fullest of cuda:0, cuda:1" in str(caught.value)


def test_estimated_device_memory_includes_triton_intermediates() -> None:
    reference, triton = tiny_case(2), tiny_case(2, experts="triton")
    routes = triton.capacity * triton.topk
    extra = routes * (triton.hidden_size + triton.intermediate_size) * 2
    assert device_bytes(triton) == device_bytes(reference) + extra
    fp8 = msgspec.structs.replace(triton, dispatch_dtype="fp8")
    weights = 3 * triton.experts_per_rank * triton.hidden_size * triton.intermediate_size
    assert device_bytes(fp8) == device_bytes(triton) + weights - triton.capacity * triton.hidden_size


@pytest.mark.parametrize(
    ("values", "rows"),
    [
        ({"limit": "off"}, 0),
        ({"limit": "off", "recv_bound": True}, 32),
        ({"limit": "max-recv"}, 10),
        ({"limit": "sum"}, 20),
        ({"limit": "pow2"}, 32),
        ({"limit": "max-recv-1"}, 0),
        ({"limit": 20}, 20),
        ({"limit": 19}, 0),
        ({"limit": 19, "policy": "unchecked"}, 19),
        ({"limit": "capacity"}, 0),
    ],
)
def test_estimated_device_memory_includes_each_graph(values: dict[str, Any], rows: int) -> None:
    eager = tiny_case(2, experts="triton", tokens=10, **values)
    graph = msgspec.structs.replace(eager, graph=True)
    row = eager.topk * (eager.hidden_size + eager.intermediate_size) * 2 + eager.hidden_size * 2
    assert device_bytes(graph) == device_bytes(eager) + rows * row


@pytest.mark.usefixtures("no_ranks")
def test_run_without_enough_device_memory_is_refused_before_a_rank_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(preflight, "count_devices", lambda: 2)
    monkeypatch.setattr(memory, "free_device_bytes", lambda _: 1000)
    assert main.main(["run", "--model=tiny", "--nproc=2", f"--out={tmp_path}"]) == 77
    assert "1000 are free on the fullest of cuda:0, cuda:1" in capsys.readouterr().err


def test_checked_output_folder_is_created_and_left_empty(tmp_path: Path) -> None:
    check_folder(str(tmp_path / "a" / "b"))
    assert not list((tmp_path / "a" / "b").iterdir())


@pytest.mark.parametrize("name", ["file", "file/below", "/proc/nowhere", "a\0b"])
def test_unwritable_output_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InvalidCase, match=r"cannot be written \(.+\); name another folder") as caught:
        check_folder(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_disk_with_fewer_free_bytes_than_the_results_need_is_refused(
    tmp_path: Path, free_disk: Callable[[int], None]
) -> None:
    free_disk(1 << 20)
    check_folder(str(tmp_path), 1 << 20)
    with pytest.raises(InvalidCase, match=r"1048576 bytes are free, results take about 1048577; name another folder"):
        check_folder(str(tmp_path), (1 << 20) + 1)


@pytest.mark.usefixtures("no_ranks")
@pytest.mark.parametrize("command", [("run", "--model=tiny"), ("suite", "smoke")])
def test_command_without_enough_host_memory_is_refused_before_a_rank_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: tuple[str, ...]
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    assert main.main([*command, "--nproc=2", f"--out={tmp_path}"]) == 77
    assert re.search(r"(?m)^distbench: UNSUPPORTED: memory: case \S.* needs about \d+ bytes", capsys.readouterr().err)


@pytest.mark.usefixtures("no_ranks")
@pytest.mark.parametrize("command", [("run", "--model=tiny"), ("suite", "smoke")])
def test_command_without_a_writable_folder_or_disk_is_refused_before_a_rank_starts(
    tmp_path: Path,
    free_disk: Callable[[int], None],
    capsys: pytest.CaptureFixture[str],
    command: tuple[str, ...],
) -> None:
    (tmp_path / "file").touch()
    assert main.main([*command, "--nproc=2", f"--out={tmp_path}/file"]) == 2
    assert "cannot be written" in capsys.readouterr().err
    free_disk(0)
    assert main.main([*command, "--nproc=2", f"--out={tmp_path}/out"]) == 2
    assert "0 bytes are free" in capsys.readouterr().err


def test_kernel_table_without_a_row_for_the_layer_gives_a_warning() -> None:
    (warning,) = check_case(tiny_case(intermediate_size=384, kernel_table="tests/data/splitk.csv"))
    assert warning.startswith("kernel_table = tests/data/splitk.csv: no row for ")
    assert not check_case(tiny_case())


def test_kernel_table_for_aiter_is_looked_up_with_this_nodes_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "check_available", lambda _: None)
    case = tiny_case(intermediate_size=384, kernel_table="tests/data/splitk.csv", experts="aiter", device="cuda")
    for units, told in (
        (256, "cu_num 256, model"),
        (None, "cu_num 304 (assumed: this node has no ROCm device), model"),
    ):
        monkeypatch.setattr(preflight, "compute_units", lambda units=units: units)
        (warning,) = check_case(case)
        assert told in warning
    (emulated,) = check_case(msgspec.structs.replace(case, emulate=True, device="cpu"))
    assert "cu_num 304, model" in emulated


@pytest.mark.parametrize("routing", ["spiral", "fan-in:9"])
def test_routing_that_does_not_fit_the_case_is_refused(routing: str) -> None:
    with pytest.raises(InvalidCase, match="routing"):
        check_case(tiny_case(routing=routing))


def test_memory_shared_by_forked_ranks_is_counted_once() -> None:
    few, many = (memory_bytes(tiny_case(ranks, num_experts=512)) for ranks in (2, 256))
    assert few > 200 << 20
    assert many < 16 << 30


def test_warning_of_a_kernel_table_without_a_row_names_the_nearest_row(tmp_path: Path) -> None:
    table = tmp_path / "tuned.csv"
    shutil.copy(Path(__file__).parents[2] / "data" / "atomic.csv", table)
    (note,) = check_case(tiny_case(4, kernel_table=str(table), hidden_size=512))
    assert "all kernels come from heuristics; the nearest row differs in model_dim 256" in note


def test_a_pipe_is_no_path_for_results(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(InvalidCase, match="a device or pipe"):
        check_path(str(pipe))
    for path in (tmp_path, tmp_path / "new.json"):
        check_path(str(path))
