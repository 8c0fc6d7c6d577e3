"""Python text of a package that is installed, or lies in a wheel or a folder, read without importing the package."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import re
import weakref
import zipfile
import zlib
from abc import ABC, abstractmethod
from email.parser import BytesHeaderParser
from pathlib import Path

from distbench.case.atom_folder import MOST_BYTES
from distbench.case.spec import Case
from distbench.case.table_file import open_regular
from distbench.errors import InvalidCase, Unsupported
from distbench.utils.text import one_line, printable

_MOST_PART_BYTES = 8 << 20
# The compressions of wheels: zipfile decompresses any other without a bound.
_BOUNDED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_VERSION = re.compile(r"[0-9A-Za-z.!+_-]{1,64}")
_SHOWN = 80
_DIGEST_DIGITS = 12
_UNREADABLE = (OSError, zipfile.BadZipFile, zlib.error, RuntimeError, ValueError, EOFError)


class PackageText(ABC):
    """Source files of one release of a package."""

    name: str
    version: str
    origin: str
    """Path of the wheel, of the installed package's folder, or of the folder that was named."""

    @abstractmethod
    def read(self, path: str) -> str:
        """Text of the file at `path`, relative to the folder that holds the package.

        Raises:
            Unsupported: the release has no such file, or the file is larger than 4 MiB or not UTF-8.

        """

    @property
    def label(self) -> str:
        """Name and release, such as sglang 0.5.23."""
        return f"{self.name} {self.version}"

    def _of_file(self, folder: Path, path: str) -> str:
        try:
            with (folder / path).open("rb") as stream:
                return self._decoded(path, stream.read(MOST_BYTES + 1))
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise self._missing(path) from error

    def _decoded(self, path: str, content: bytes) -> str:
        if len(content) > MOST_BYTES:
            message = f"{self.label}: {path} is larger than {MOST_BYTES >> 20} MiB; it is no source file"
            raise Unsupported(message)
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            message = f"{self.label}: {path} is not UTF-8 ({one_line(error)})"
            raise Unsupported(message) from error

    def _missing(self, path: str) -> Unsupported:
        return Unsupported(f"{self.label}: has no file {path}; use a release that has it")


class FolderText(PackageText):
    """The package `name` in a folder that a flag names; its digest is its version, since a checkout has no other."""

    def __init__(self, name: str, folder: str, digest: str) -> None:
        """`digest` is the SHA-256 of the files that are read, 64 hex digits."""
        self.name, self.version, self.origin = name, digest[:_DIGEST_DIGITS], folder

    def read(self, path: str) -> str:
        """See `PackageText.read`."""
        return self._of_file(Path(self.origin), path)


class InstalledText(PackageText):
    """The installed package `name`, found by its location; nothing of it is executed."""

    def __init__(self, name: str) -> None:
        """Find the package.

        Raises:
            Unsupported: the package is not installed.

        """
        spec = importlib.util.find_spec(name)
        places = None if spec is None else spec.submodule_search_locations
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = ""
        if not places or not version:
            message = f"caller {name}: the package {name} is not installed; install it, or name a wheel: --caller-wheel"
            raise Unsupported(message)
        self.name, self.version, self.origin = name, version, str(next(iter(places)))

    def read(self, path: str) -> str:
        """See `PackageText.read`."""
        return self._of_file(Path(self.origin).parent, path)


class _Parts(io.BufferedReader):
    """A file of which no part above 8 MiB is read at once: a list of members, which zipfile reads whole, among them."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Read `size` bytes, or the rest of the file.

        Raises:
            ValueError: these are more than 8 MiB.

        """
        content = super().read(_MOST_PART_BYTES + 1 if size is None or size < 0 else min(size, _MOST_PART_BYTES + 1))
        if len(content) > _MOST_PART_BYTES:
            message = f"a list of members above {_MOST_PART_BYTES >> 20} MiB"
            raise ValueError(message)
        return content


class WheelText(PackageText):
    """The package `name` in the wheel at `origin`."""

    def __init__(self, name: str, path: str) -> None:
        """Open the wheel.

        Raises:
            InvalidCase: the file is no wheel of the package.

        """
        self.name, self.origin = name, path
        try:
            parts = _Parts(io.FileIO(open_regular(path)))
            weakref.finalize(self, parts.close)
            self._archive = zipfile.ZipFile(parts)
            self.version = self._metadata()
        except _UNREADABLE as error:
            message = (
                f"caller_wheel = {path!r:.200}: no readable wheel ({one_line(error):.200}); give a wheel of {name}"
            )
            raise InvalidCase(message) from error

    def read(self, path: str) -> str:
        """See `PackageText.read`."""
        try:
            content = self._content(path)
        except KeyError as error:
            raise self._missing(path) from error
        except _UNREADABLE as error:
            message = f"{self.label}: {path} cannot be read from {self.origin} ({one_line(error):.200})"
            raise Unsupported(message) from error
        return self._decoded(path, content)

    def _content(self, path: str) -> bytes:
        """Content of a member, cut just above the size allowed for a source file."""
        method = self._archive.getinfo(path).compress_type
        if method not in _BOUNDED:
            message = f"compressed by method {method}; wheels are stored or deflated"
            raise ValueError(message)
        with self._archive.open(path) as stream:
            return stream.read(MOST_BYTES + 1)

    def _metadata(self) -> str:
        """Version that the wheel's METADATA states."""
        names = self._archive.namelist()
        found = [name for name in names if name.endswith(".dist-info/METADATA") and name.count("/") == 1]
        if len(found) != 1:
            message = f"{len(names)} files, {len(found)} of them METADATA"
            raise ValueError(message)
        header = BytesHeaderParser().parsebytes(self._content(found[0]))
        named, version = str(header["Name"]), str(header["Version"])
        if named.lower().replace("_", "-") != self.name or not header["Version"] or not _VERSION.fullmatch(version):
            message = f"a wheel of {printable(named[:_SHOWN])} {printable(version[:_SHOWN])}"
            raise ValueError(message)
        return version


def package_text(case: Case) -> PackageText:
    """The text of a case's caller: of the folder or the wheel that the case names, else of the installed package.

    Raises:
        InvalidCase: the wheel is none of the package.
        Unsupported: no wheel is named, and the package is not installed.

    """
    if case.caller_folder:
        return FolderText(case.caller, case.caller_folder, case.caller_folder_sha256)
    return WheelText(case.caller, case.caller_wheel) if case.caller_wheel else InstalledText(case.caller)
