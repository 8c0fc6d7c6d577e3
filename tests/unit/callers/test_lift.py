"""Definitions lifted from a package's text: only they are executed, and nothing that they need is missing."""

from __future__ import annotations

import gc
import os
import random
import struct
import sys
import tracemalloc
import weakref
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from distbench.callers.lift import Lift, Stub, Unreached
from distbench.callers.packages import InstalledText, PackageText, WheelText
from distbench.errors import InvalidCase, Unsupported

PATH = "shop/till.py"
TEXT = """
from __future__ import annotations
import absent_module
from dataclasses import dataclass
from typing import NamedTuple

raise RuntimeError("the module itself is never executed")

RATE = 3
UNUSED = absent_module.value


def register_price(name):
    raise RuntimeError


@register_price("plain")
def price(count: int) -> int:
    from shop.rates import extra

    return count * RATE + extra()


@dataclass
class Basket:
    count: int
    owner: UnknownType | None = None


class Line(NamedTuple):
    count: int


class Settings:
    FIRST = RATE + 1
    SECOND = absent_module.value


def total(basket):
    return undefined_name(basket)
"""
METADATA = "Metadata-Version: 2.1\nName: shop\nVersion: 1.2.3\n"


def wheel(path: Path, text: str = TEXT, metadata: str = METADATA, *, compressed: bool = False) -> str:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as archive:
        archive.writestr(PATH, text)
        archive.writestr("shop-1.2.3.dist-info/METADATA", metadata)
    return str(path)


@pytest.fixture
def shop(tmp_path: Path) -> PackageText:
    return WheelText("shop", wheel(tmp_path / "shop-1.2.3-py3-none-any.whl"))


def lifter(text: PackageText, **modules: Any) -> Lift:
    return Lift(text, modules or {"shop.rates": Stub(extra=lambda: 7)})


def standard() -> dict[str, Any]:
    return {"dataclass": dataclass, "NamedTuple": NamedTuple}


def test_lifted_function_runs_without_its_module_or_its_registration(shop: PackageText) -> None:
    names = lifter(shop).lift(PATH, ("RATE", "price"), {})
    assert names["price"](2) == 13
    assert "shop" not in sys.modules
    assert "shop.rates" not in sys.modules


def test_dataclass_and_named_tuple_are_lifted(shop: PackageText) -> None:
    names = lifter(shop).lift(PATH, ("Basket", "Line"), standard())
    assert names["Basket"](2).owner is None
    assert names["Line"](4).count == 4


def test_named_members_of_a_class_are_lifted_alone(shop: PackageText) -> None:
    settings = lifter(shop).lift(PATH, ("RATE", "Settings.FIRST"), {})["Settings"]
    assert settings.FIRST == 4
    assert not hasattr(settings, "SECOND")


@pytest.mark.parametrize("name", ["absent", "Settings.THIRD", "Absent.member"])
def test_missing_definition_is_unsupported_and_named(shop: PackageText, name: str) -> None:
    with pytest.raises(Unsupported, match=rf"shop 1\.2\.3: {PATH} does not define {name}"):
        lifter(shop).lift(PATH, (name,), {})


def test_missing_global_is_unsupported_when_lifted(shop: PackageText) -> None:
    with pytest.raises(Unsupported, match="uses undefined_name, which distbench does not provide"):
        lifter(shop).lift(PATH, ("total",), {})


@pytest.mark.parametrize(
    ("modules", "what"),
    [({"other": Stub()}, "shop.rates"), ({"shop.rates": Stub(other=1)}, "extra from shop.rates")],
)
def test_import_that_the_table_does_not_answer_is_unsupported(
    shop: PackageText, modules: dict[str, Any], what: str
) -> None:
    with pytest.raises(Unsupported, match=what):
        Lift(shop, modules).lift(PATH, ("RATE", "price"), {})


@pytest.mark.parametrize("line", ["from json.decoder import JSONDecoder as extra", "import json.decoder as extra"])
def test_import_beside_a_package_of_the_table_is_unsupported_where_it_is_reached(tmp_path: Path, line: str) -> None:
    text = TEXT.replace("from shop.rates import extra", line)
    one = WheelText("shop", wheel(tmp_path / "one.whl", text))
    price = Lift(one, {"json": Stub()}).lift(PATH, ("RATE", "price"), {})["price"]
    with pytest.raises(Unsupported, match=r"imports json\.decoder, which distbench does not provide"):
        price(1)


def test_definition_that_raises_is_unsupported(shop: PackageText) -> None:
    with pytest.raises(Unsupported, match="cannot be executed: ZeroDivisionError"):
        lifter(shop).lift(PATH, ("UNUSED",), {"absent_module": _Raises()})


class _Raises:
    @property
    def value(self) -> int:
        return 1 // 0


def test_missing_file_is_unsupported(shop: PackageText) -> None:
    with pytest.raises(Unsupported, match=r"shop 1\.2\.3: has no file shop/absent\.py"):
        lifter(shop).lift("shop/absent.py", ("price",), {})


def test_digest_covers_lifted_text_and_nothing_else(tmp_path: Path) -> None:
    digests = []
    for number, (old, new) in enumerate([("", ""), ("RATE = 3", "RATE = 4"), ("first", "first"), ("UNUSED", "USED")]):
        one = WheelText("shop", wheel(tmp_path / f"{number}.whl", TEXT.replace(old, new, 1) if old else TEXT))
        lift = lifter(one)
        lift.lift(PATH, ("RATE", "price"), {})
        assert lift.files == [PATH]
        digests.append(lift.sha256)
    assert digests[0] == digests[2] == digests[3] != digests[1]


def test_decorators_and_members_that_are_kept_are_part_of_the_digest(tmp_path: Path) -> None:
    digests = []
    for number, new in enumerate(["FIRST = RATE + 1", "FIRST = RATE + 2"]):
        one = WheelText("shop", wheel(tmp_path / f"{number}.whl", TEXT.replace("FIRST = RATE + 1", new)))
        lift = lifter(one)
        lift.lift(PATH, ("RATE", "Settings.FIRST", "Basket"), standard())
        digests.append(lift.sha256)
    assert digests[0] != digests[1]


BASES = "class Basket(\n    Held,\n    Sold,\n):\n    count = 1\n"


@pytest.mark.parametrize(
    ("text", "name", "old", "new"),
    [
        (BASES, "Basket", "Sold", "Lent"),
        ("\f\f\n\n\nRATE = 3\n", "RATE", "3", "4"),
        ("NAME = '\u2028\u2028\x1c'\n\n\nRATE = 3\n", "RATE", "3", "4"),
        ("NAME = 1\r\rRATE = 3\r", "RATE", "3", "4"),
    ],
)
def test_digest_is_of_the_lines_that_are_executed(tmp_path: Path, text: str, name: str, old: str, new: str) -> None:
    digests = set()
    for number, one in enumerate((text, text.replace(old, new))):
        lift = lifter(WheelText("shop", wheel(tmp_path / f"{number}.whl", one)))
        lift.lift(PATH, (name,), {"Held": Stub, "Sold": _Raises, "Lent": _Raises})
        digests.add(lift.sha256)
    assert len(digests) == 2


def test_lifted_code_leaves_no_module_and_is_freed_with_what_it_was_given(shop: PackageText) -> None:
    before, held = dict(sys.modules), Stub()
    known = weakref.ref(held)
    names = lifter(shop).lift(PATH, ("RATE", "price", "Basket", "Line"), standard() | {"held": held})
    assert sys.modules == before
    assert names["Basket"](2).count == 2
    del names, held
    gc.collect()
    assert known() is None


def test_any_use_of_an_unreached_name_is_refused() -> None:
    with pytest.raises(Unsupported, match="upscale"):
        Unreached("upscale")(1)
    with pytest.raises(Unsupported, match="upscale"):
        _ = Unreached("upscale").attribute


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [(METADATA.replace("shop", "other"), "a wheel of other"), (METADATA.replace("Version: 1.2.3\n", ""), "None")],
)
def test_wheel_of_another_package_or_without_version_is_invalid(tmp_path: Path, metadata: str, reason: str) -> None:
    path = wheel(tmp_path / "one.whl", metadata=metadata)
    with pytest.raises(InvalidCase, match=reason):
        WheelText("shop", path)


@pytest.mark.parametrize("version", ["1\x1b[31m", "1\n 2", "9" * 100_000, "1 [red]", "\xff"])
def test_version_that_no_release_has_is_refused_in_a_short_printable_message(tmp_path: Path, version: str) -> None:
    path = wheel(tmp_path / "one.whl", metadata=METADATA.replace("1.2.3", version))
    with pytest.raises(InvalidCase, match="a wheel of shop") as caught:
        WheelText("shop", path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 no archive"])
def test_file_that_is_no_wheel_is_invalid(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "one.whl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidCase, match=r"caller_wheel = .*one\.whl"):
        WheelText("shop", str(path))


def test_oversized_source_is_unsupported(tmp_path: Path) -> None:
    one = WheelText("shop", wheel(tmp_path / "one.whl", "#" * (4 << 20) + "\n"))
    with pytest.raises(Unsupported, match="larger than 4 MiB"):
        one.read(PATH)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_member_that_is_decompressed_without_a_bound_is_refused_before(tmp_path: Path, method: int) -> None:
    path = tmp_path / "one.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(PATH, bytes(64 << 20), compress_type=method)
        archive.writestr("shop-1.2.3.dist-info/METADATA", METADATA)
    tracemalloc.start()
    try:
        with pytest.raises(Unsupported, match="wheels are stored or deflated"):
            WheelText("shop", str(path)).read(PATH)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_wheel_that_lists_very_many_members_is_refused_before_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "one.whl"
    entry = struct.pack("<4s6H3I5H2I", b"PK\x01\x02", *(0,) * 16)
    size = (9 << 20) // len(entry) * len(entry)
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 0, 0, size, 0, 0)
    path.write_bytes(entry * (size // len(entry)) + end)
    with pytest.raises(InvalidCase, match="a list of members above 8 MiB"):
        WheelText("shop", str(path))


def test_any_damaged_wheel_is_refused_by_name(tmp_path: Path) -> None:
    whole = Path(wheel(tmp_path / "one.whl", TEXT * 20, compressed=True)).read_bytes()
    chance, path, refused = random.Random(5), tmp_path / "damaged.whl", 0
    for _ in range(1500):
        content = bytearray(whole)
        for _ in range(chance.randrange(1, 4)):
            content[chance.randrange(len(content))] = chance.randrange(256)
        path.write_bytes(content)
        try:
            WheelText("shop", str(path)).read(PATH)
        except (InvalidCase, Unsupported):
            refused += 1
    assert refused > 500


def test_pipe_is_no_wheel(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "one.whl")
    with pytest.raises(InvalidCase, match="not a regular file"):
        WheelText("shop", str(tmp_path / "one.whl"))


def test_installed_package_is_read_and_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "__init__.py").write_text("raise RuntimeError")
    (tmp_path / PATH).write_text(TEXT)
    (tmp_path / "shop-1.2.3.dist-info").mkdir()
    (tmp_path / "shop-1.2.3.dist-info" / "METADATA").write_text(METADATA)
    monkeypatch.syspath_prepend(str(tmp_path))
    text = InstalledText("shop")
    assert (text.label, text.origin) == ("shop 1.2.3", str(tmp_path / "shop"))
    assert lifter(text).lift(PATH, ("RATE", "price"), {})["price"](1) == 10
    assert "shop" not in sys.modules
    with pytest.raises(Unsupported, match=r"has no file shop/absent\.py"):
        text.read("shop/absent.py")


def test_package_that_is_not_installed_is_unsupported() -> None:
    with pytest.raises(Unsupported, match=r"not installed.*--caller-wheel"):
        InstalledText("no_such_package_here")
