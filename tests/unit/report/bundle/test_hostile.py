"""Bundles from untrusted sources: any content is read as its format defines, or refused."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from distbench.cli.main import main
from distbench.errors import InvalidCase
from distbench.report.bundle.analysis import analyse
from distbench.report.bundle.layout import KERNEL_TABLE, MANIFEST, MAX_HEADER_BYTES, MAX_PART_BYTES, REPORT, part_name
from distbench.report.bundle.read import open_bundle, runnable_case
from distbench.workload.inputs import Workload
from distbench.workload.version import INPUTS_VERSION
from tests.cases import tiny_case
from tests.distributed.bundles import leave_bundle, run_healthy

PART = part_name(0)
Attack = Callable[[Path], object]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "healthy"
    case = tiny_case(2, limit="max-recv-1", policy="unchecked", kernel_table="tests/data/splitk.csv")
    leave_bundle(folder, run_healthy, case)
    return folder


@pytest.fixture
def bundle(healthy: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(healthy, tmp_path / "bundle"))


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def change_part(folder: Path, change: Callable[[bytes], bytes]) -> None:
    """Change a part, and update its digest in the manifest."""
    content = change((folder / PART).read_bytes())
    (folder / PART).write_bytes(content)
    part = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    change_manifest(folder, lambda manifest: manifest["recorded"]["parts"][0].update(part))


def change_header(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    def changed(content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + length :]

    change_part(folder, changed)


def with_header(text: bytes) -> Callable[[bytes], bytes]:
    return lambda content: len(text).to_bytes(8, "little") + text + content[8 + int.from_bytes(content[:8], "little") :]


def set_case(**values: object) -> Attack:
    return lambda folder: change_manifest(folder, lambda manifest: manifest["case"].update(values))


def set_recorded(**values: object) -> Attack:
    return lambda folder: change_manifest(folder, lambda manifest: manifest["recorded"].update(values))


STRANGE_VERSIONS: tuple[object, ...] = (0, -1, 1 << 31, 1 << 70, 1.5, "2", True, None, [2], {})


def set_version(manifest: object, report: object = INPUTS_VERSION) -> Attack:
    def attack(folder: Path) -> None:
        for name, version in ((MANIFEST, manifest), (REPORT, report)):
            content = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps(content | {"inputs_version": version}))

    return attack


def of_other_inputs(then: Attack) -> Attack:
    def attack(folder: Path) -> None:
        set_version(1, 1)(folder)
        then(folder)

    return attack


def set_tensor(name: str, **values: object) -> Attack:
    return lambda folder: change_header(folder, lambda header: header[name].update(values))


def set_divergence(**values: object) -> Attack:
    return lambda folder: change_manifest(
        folder, lambda manifest: manifest["gathered"]["observations"][0]["divergences"][0].update(values)
    )


def set_evidence(**values: object) -> Attack:
    return lambda folder: change_manifest(
        folder,
        lambda manifest: (
            manifest["gathered"]["observations"][0]["divergences"][0].setdefault("clues", {}).update(values)
        ),
    )


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    def changed(content: bytes) -> bytes:
        tensors: dict[str, Tensor] = load(content)
        change(tensors)
        return save({name: tensor.contiguous() for name, tensor in tensors.items()})

    change_part(folder, changed)


def list_one_token_often(tensors: dict[str, Tensor]) -> None:
    for name in list(tensors):
        if name != "routing":
            del tensors[name]
    tensors["token.index"] = torch.zeros(10_000, dtype=torch.int64)


def repeat_rows(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if name.startswith("padded.") and name != "padded.cut"]:
        tensors[name] = tensors[name].repeat(10, *[1] * (tensors[name].dim() - 1))


BULK: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "one token ten thousand times": list_one_token_often,
    "no tensor but the tokens": lambda tensors: [tensors.pop(name) for name in list(tensors) if "hidden" in name],
    "rows of an arm ten times": repeat_rows,
}


@pytest.mark.parametrize("attack", BULK)
def test_contradictory_bundle_part_is_refused_before_inputs_are_generated(
    attack: str, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(*_: object) -> None:
        pytest.fail("inputs were made")

    set_recorded(tokens=[[0, 0], *json.loads((bundle / MANIFEST).read_text())["recorded"]["tokens"]])(bundle)
    change_tensors(bundle, BULK[attack])
    monkeypatch.setattr(Workload, "token_rows", made)
    with pytest.raises(InvalidCase, match="contradicts itself"):
        analyse(open_bundle(bundle))


def replace_by_link(name: str) -> Attack:
    def attack(folder: Path) -> None:
        aside = folder.parent / "aside"
        (folder / name).rename(aside)
        (folder / name).symlink_to(aside)

    return attack


def replace_by_pipe(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    os.mkfifo(folder / MANIFEST)


def replace_by_folder(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    (folder / MANIFEST).mkdir()


def grow(name: str, size: int) -> Attack:
    return lambda folder: os.truncate(folder / name, size)


ATTACKS: dict[str, Attack] = {
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "no report": lambda folder: (folder / REPORT).unlink(),
    "manifest cut short": lambda folder: os.truncate(folder / MANIFEST, 1000),
    "manifest too large": grow(MANIFEST, 1 << 30),
    "part too large": grow(PART, MAX_PART_BYTES + 1),
    "part cut short": lambda folder: os.truncate(folder / PART, 1000),
    "part cut short, vouched for": lambda folder: change_part(folder, lambda content: content[:-100]),
    "part longer, vouched for": lambda folder: change_part(folder, lambda content: content + b"\0" * 8),
    "part empty, vouched for": lambda folder: change_part(folder, lambda _: b""),
    "one byte of a part changed": lambda folder: (folder / PART).write_bytes((folder / PART).read_bytes()[:-1] + b"x"),
    "part is a link": replace_by_link(PART),
    "manifest is a link": replace_by_link(MANIFEST),
    "report is a link": replace_by_link(REPORT),
    "manifest is a pipe": replace_by_pipe,
    "manifest is a folder": replace_by_folder,
    "nested too deep": lambda folder: (folder / MANIFEST).write_text("[" * 100_000),
    "of another schema": lambda folder: change_manifest(folder, lambda manifest: manifest.update(schema="x/9")),
    "another version of inputs than the report's": set_version(1),
    **{f"inputs of version {strange!r}": set_version(strange, strange) for strange in STRANGE_VERSIONS},
    "other inputs without an oracle": of_other_inputs(
        lambda folder: change_header(folder, lambda header: header.pop("padded.oracle"))
    ),
    "other inputs with an oracle too long": of_other_inputs(
        lambda folder: change_tensors(
            folder, lambda tensors: tensors.update({"token.oracle": tensors["token.oracle"].repeat(9, 1)})
        )
    ),
    "a million ranks": set_case(ep_size=1_000_000, tokens=[1] * 1_000_000),
    "sixty thousand ranks without a part": set_case(ep_size=60_000, tokens=[1] * 60_000),
    "a negative number of ranks": set_case(ep_size=-1),
    "no rank": set_case(ep_size=0, tokens=[]),
    "millions of experts": set_case(num_experts=1 << 24),
    "millions of columns": set_case(hidden_size=1 << 24),
    "tokens of too few ranks": set_case(tokens=[1]),
    "an unknown key in the case": set_case(evil=1),
    "parts of other ranks": lambda folder: change_manifest(
        folder, lambda manifest: manifest["recorded"]["parts"].reverse()
    ),
    "a part of rank -1": lambda folder: change_manifest(
        folder, lambda manifest: manifest["recorded"]["parts"][0].update(rank=-1)
    ),
    "a digest that is a path": lambda folder: change_manifest(
        folder, lambda manifest: manifest["recorded"]["parts"][0].update(sha256="../../etc/passwd")
    ),
    "more tokens than are recorded": set_recorded(tokens=[[0, 0]] * 65),
    "a token that is not there": set_recorded(tokens=[[0, 1 << 40]]),
    "a token of a negative rank": set_recorded(tokens=[[-1, 0]]),
    "tokens that the manifest does not list": set_recorded(tokens=[]),
    "records of too few ranks": lambda folder: change_manifest(
        folder, lambda manifest: manifest["gathered"]["observations"].pop()
    ),
    "records without arms": lambda folder: change_manifest(
        folder, lambda manifest: manifest["gathered"].update(comparisons={})
    ),
    "an arm that is none": lambda folder: change_manifest(
        folder, lambda manifest: manifest["gathered"]["observations"][0]["divergences"][0].update(arm="x")
    ),
    "a divergence of another rank": set_divergence(rank=1),
    "a divergence of a rank that is none": set_divergence(rank=99),
    "a source rank that is none": set_divergence(source_rank=10**12),
    "a source token that is none": set_divergence(source_token=10**12),
    "a source of half a name": set_divergence(source_rank=None),
    "a suspect that is none": set_evidence(suspects=[77]),
    "a clue of a token that is none": set_evidence(tokens=[[0, 10**12]]),
    "a clue of a destination that is none": set_evidence(by_destination={"x": 1}),
    "a lost token that is none": lambda folder: change_manifest(
        folder, lambda manifest: manifest["gathered"]["observations"][0]["lost"].update(tokens=[[7, 0]])
    ),
    "a differing token that is none": lambda folder: change_manifest(
        folder, lambda manifest: manifest["gathered"]["differing"].update({"padded/truncated": [[-1, 0]]})
    ),
    "more routing than tokens": lambda folder: change_tensors(
        folder, lambda tensors: tensors.update(routing=tensors["routing"].repeat(1000, 1))
    ),
    "traffic of other ranks": lambda folder: change_manifest(
        folder, lambda manifest: manifest["traffic"].update(total_recv=[1] * 7)
    ),
    "parts but no traffic": lambda folder: change_manifest(folder, lambda manifest: manifest.update(traffic=None)),
    "a huge header": lambda folder: change_part(
        folder, with_header(b'{"padded.hidden":' + b" " * MAX_HEADER_BYTES + b"{}}")
    ),
    "a header longer than the file": lambda folder: change_part(folder, lambda content: b"\xff" * 8 + content[8:]),
    "a header that is a list": lambda folder: change_part(folder, with_header(b"[]")),
    "a header nested too deep": lambda folder: change_part(folder, with_header(b"[" * 100_000)),
    "a name twice": lambda folder: change_part(
        folder, with_header(b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},' * 1 + b'"a":{}}')
    ),
    "a wrong dtype": set_tensor("padded.hidden", dtype="F64"),
    "an unknown dtype": set_tensor("padded.hidden", dtype="PICKLE"),
    "a wrong width": set_tensor("padded.hidden", shape=[1, 999]),
    "a negative shape": set_tensor("padded.hidden", shape=[-1, 256]),
    "a shape of a billion rows": set_tensor("padded.hidden", shape=[1 << 30, 256]),
    "offsets past the end": set_tensor("padded.hidden", data_offsets=[0, 1 << 40]),
    "offsets that overlap": set_tensor("padded.hidden", data_offsets=[0, 512]),
    "a tensor of another name": lambda folder: change_header(
        folder, lambda header: header.update({"../../evil": header.pop("padded.hidden")})
    ),
    "a tensor less": lambda folder: change_header(folder, lambda header: header.pop("padded.experts")),
    "digests that are no table": lambda folder: change_header(
        folder, lambda header: header.update({"__metadata__": {"digests": "[1]"}})
    ),
    "metadata that is no text": lambda folder: change_header(
        folder, lambda header: header.update({"__metadata__": {"digests": 1}})
    ),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_hostile_bundle_is_refused_with_a_reason(attack: str, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ATTACKS[attack](bundle)
    assert main(["replay", str(bundle), "--offline"]) == 2
    complaint = capsys.readouterr().err.removeprefix("distbench: replay: analysing the recording\n")
    assert complaint.startswith("distbench: INVALID: bundle ")
    assert complaint.count("\n") == 1


def test_unmodified_bundle_is_read(bundle: Path) -> None:
    assert main(["replay", str(bundle), "--offline"]) == 0


@pytest.mark.parametrize("version", [1, INPUTS_VERSION + 1, (1 << 31) - 1])
def test_unmodified_bundle_of_other_inputs_is_read(version: int, bundle: Path) -> None:
    set_version(version, version)(bundle)
    assert main(["replay", str(bundle), "--offline"]) == 0


def test_kernel_table_in_the_bundle_is_used_instead_of_the_path_in_the_case(bundle: Path) -> None:
    set_case(kernel_table="/etc/passwd")(bundle)
    assert runnable_case(open_bundle(bundle)).kernel_table == str(bundle / KERNEL_TABLE)


def test_kernel_table_with_another_digest_is_refused(bundle: Path) -> None:
    (bundle / KERNEL_TABLE).write_text("cu_num\n")
    with pytest.raises(InvalidCase, match="not the table that the case ran with"):
        runnable_case(open_bundle(bundle))


def test_kernel_table_that_is_a_symbolic_link_is_refused(bundle: Path) -> None:
    replace_by_link(KERNEL_TABLE)(bundle)
    with pytest.raises(InvalidCase, match="cannot be read"):
        runnable_case(open_bundle(bundle))


def flipped(content: bytes, place: float, mask: int, length: int) -> bytes:
    """Change some bytes; half of the time near the beginning, where the structure is."""
    start = int(place * len(content)) if mask % 2 else int(place * min(len(content), 3000))
    changed = bytes(byte ^ mask for byte in content[start : start + length])
    return content[:start] + changed + content[start + length :]


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from([MANIFEST, REPORT, PART]),
    where=st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255), st.integers(1, 4)),
)
def test_bundle_with_any_bytes_changed_is_read_or_refused(
    healthy: Path, name: str, where: tuple[float, int, int]
) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(shutil.copytree(healthy, Path(place) / "changed"))
        if name == PART:
            change_part(folder, lambda content: flipped(content, *where))
        else:
            (folder / name).write_bytes(flipped((folder / name).read_bytes(), *where))
        with contextlib.suppress(InvalidCase):
            analyse(open_bundle(folder))
