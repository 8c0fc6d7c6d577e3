"""The package aiter, or its stand-in: import on demand, and its settings."""

from __future__ import annotations

import csv
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import io
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from packaging.version import Version

from distbench.case.aiter_env import BYPASS_TUNE, KERNEL_TABLES, KSPLIT
from distbench.case.spec import Case
from distbench.errors import InvalidCase, Unsupported
from distbench.experts.once_per_node import first_on_node
from distbench.experts.selection.releases import BUCKET_RULES, padded_rows, rules_for
from distbench.utils.variables import whole
from distbench.utils.versions import release_of

DISTRIBUTION = "amd-aiter"
PACKAGE = "aiter"
STAND_IN = "distbench.experts.aiter.emulated"
LIMIT_SINCE = "0.1.17"
"""The release in which `fused_moe` got the parameter swiglu_limit."""
SWIGLU_SINCE = "0.1.19.post1"
"""The release in which CK's two stages got swiglu (gemm_moe_ck2stages.cu)."""
BUILD_VARIABLE = "AITER_JIT_DIR"
INSTALL = (
    "run in a ROCm container that has it, or install amd-aiter for this ROCm (docs/amd.md); "
    "--emulate takes distbench's stand-in"
)


class AiterPackage(NamedTuple):
    """The modules of aiter that are used here, or those of its stand-in."""

    version: str
    root: Any
    moe: Any
    shuffle: Any
    core: Any
    chip: Any


def check_available(case: Case) -> None:
    """Refuse cases that cannot run here, without loading anything heavy.

    Raises:
        Unsupported: aiter is not installed.
        InvalidCase: the stand-in has no such quirks, or quirks were given for the real package.
    """
    check_quirks(case)
    if case.emulate:
        return
    if case.aiter_habits:
        _refuse(f"aiter_habits = {case.aiter_habits!r:.80}: quirks apply to the stand-in only; add --emulate")
    if importlib.util.find_spec(PACKAGE) is None:
        message = f"experts aiter: the package {DISTRIBUTION} is not installed; {INSTALL}"
        raise Unsupported(message)


def check_quirks(case: Case) -> None:
    """Refuse quirks that the stand-in does not have.

    Raises:
        InvalidCase: names the quirks that it has.

    """
    try:
        importlib.import_module(f"{STAND_IN}.quirks").parse_quirks(case.aiter_habits)
    except ValueError as error:
        _refuse(f"aiter_habits = {case.aiter_habits!r:.80}: {error}")


def installed_tables(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return the tuned tables that the installed aiter would read, without importing it; empty if it is missing.

    AITER_CONFIG_FMOE replaces the release's own set: configs/tuned_fmoe.csv and those of model_configs.
    """
    named = environ.get(KERNEL_TABLES, "")
    spec = importlib.util.find_spec(PACKAGE)
    if named or spec is None or not spec.submodule_search_locations:
        return [part for part in named.split(os.pathsep) if part]
    configs = Path(spec.submodule_search_locations[0]) / "configs"
    own = [configs / "tuned_fmoe.csv", *sorted((configs / "model_configs").glob("*tuned_fmoe*.csv"))]
    return [str(path) for path in own if path.is_file() and "untuned" not in path.name]


def installed_release() -> str:
    """Return the version of the installed aiter; empty if it is missing."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return ""


def load_package(root: str) -> AiterPackage:
    """Import aiter, first on one rank per node because it compiles modules then; or import the package at `root`.

    Raises:
        Unsupported: it cannot be imported, as without a HIP toolchain or a GPU; the message says what to install.
    """
    try:
        if root == PACKAGE:
            first_on_node(_build_folder(), f"import-{installed_release()}", partial(_import, root))
        modules = _import(root)
    except Exception as error:  # aiter compiles and queries the device while it is imported: any exception may come
        message = f"experts aiter: cannot be imported ({type(error).__name__}: {error!s:.200}); {INSTALL}"
        raise Unsupported(" ".join(message.split())) from error
    return AiterPackage(installed_version(root, modules[0]), *modules)


def _import(root: str) -> list[Any]:
    names = ("", ".fused_moe", ".ops.shuffle", ".jit.core", ".jit.utils.chip_info")
    return [importlib.import_module(root + name) for name in names]


def _build_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the folder where aiter keeps compiled modules, by its own rules; its parent if it does not exist yet.

    aiter makes the one in the home folder as a copy, which must not exist before.
    """
    if environ.get(BUILD_VARIABLE):
        folder = Path(environ[BUILD_VARIABLE])
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    spec = importlib.util.find_spec(PACKAGE)
    if spec is not None and spec.submodule_search_locations:
        packaged = Path(spec.submodule_search_locations[0]) / "jit"
        if os.access(packaged, os.W_OK):
            return packaged
    at_home = Path("~/.aiter").expanduser()
    at_home.mkdir(exist_ok=True)
    return at_home / "jit" if (at_home / "jit").is_dir() else at_home


def installed_version(root: str, module: Any) -> str:
    """Return the version of the package at `root`, which decides its selection rules.

    Raises:
        Unsupported: an aiter on the path that is not installed.
    """
    if root == STAND_IN:
        return str(module.quirks.assumed().version)
    version = installed_release()
    if not version:
        message = f"experts aiter: {PACKAGE} can be imported, but {DISTRIBUTION} is not installed, so its version and "
        message += "rules are unknown; install it with pip"
        raise Unsupported(message)
    return version


class TunedTable(msgspec.Struct, frozen=True):
    """A table at this moment; without digest and rows if it cannot be read."""

    path: str
    sha256: str = ""
    rows: int | None = None


class TunedTables(msgspec.Struct, frozen=True):
    """Origin of aiter's tuned rows: the `sources`, and the file that it reads, a merged one if there are several.

    Merged files lie where all users of a machine write theirs, so only digests tell which rows were used.
    """

    sources: list[TunedTable]
    read: list[TunedTable]


def tuned_tables(package: AiterPackage) -> TunedTables:
    """Return aiter's tables at this moment."""
    path = getattr(package.core, "AITER_CONFIG_FMOE_FILE", None)
    if path is None:
        path = getattr(getattr(package.core, "AITER_CONFIGS", None), "AITER_CONFIG_FMOE_FILE", "")
    read = [part for part in str(path).split(os.pathsep) if part]
    sources = installed_tables() if package.root.__name__ == PACKAGE else read
    return TunedTables([_described(one) for one in sources], [_described(one) for one in read])


def _described(path: str) -> TunedTable:
    try:
        content = Path(path).read_bytes()
    except OSError:
        return TunedTable(path)
    lines = csv.reader(io.StringIO(content.decode(errors="replace"), newline=""))
    rows = sum(bool(line) for line in lines)
    return TunedTable(path, hashlib.sha256(content).hexdigest(), max(rows - 1, 0))


def followed_release(case: Case, package: AiterPackage) -> str:
    """Return the release whose rules the installed aiter follows: its own, or the case's if the build has no tags.

    Raises:
        InvalidCase: its release is unknown, or the case names another release.
    """
    said, installed = case.aiter_version, package.version
    try:
        rules_for(installed)
    except InvalidCase:
        if not said:
            raise
        _check_buckets(said, package)
        return said
    if said not in ("", installed):
        _refuse(f"aiter_version = {said!r}: {installed} is installed; drop the key, or install that one")
    return installed


def _check_buckets(said: str, package: AiterPackage) -> None:
    """Refuse a release that the package cannot have been built from, because its buckets differ."""
    rules = rules_for(said)
    for rows in sorted({1, *(tier for known in BUCKET_RULES.values() for tier in known.tiers)}):
        there, expected = int(package.moe.get_padded_M(rows)), padded_rows(rows, rules)
        if there != expected:
            _refuse(
                f"aiter_version = {said!r}: the installed {package.version} has bucket {there} for {rows} rows, the "
                f"release {expected}; give the release it was built from"
            )


def check_settings(case: Case, environ: Mapping[str, str] = os.environ) -> None:
    """Refuse a table or overrides other than those that the installed aiter reads from its environment.

    Raises:
        InvalidCase: the message says what to set.
    """
    if case.kernel_table and case.kernel_table != environ.get(KERNEL_TABLES):
        _refuse(
            f"kernel_table = {case.kernel_table!r}: aiter reads its table when it is imported; set "
            f"{KERNEL_TABLES}={case.kernel_table} for the launch too"
        )
    asked = {
        KSPLIT: ("aiter_ksplit", case.aiter_ksplit),
        BYPASS_TUNE: ("aiter_bypass_tune", int(case.aiter_bypass_tune)),
    }
    for name, (key, value) in asked.items():
        if whole(name, environ.get(name, "").strip() or "0") != value:
            _refuse(f"{key} = {value}: aiter reads {name} in its environment; set it to {value} for the launch too")


def check_parameters(case: Case, package: AiterPackage) -> None:
    """Refuse an argument for which the release's `fused_moe` has no parameter.

    Raises:
        Unsupported: names the argument and the release that has it.
    """
    if not case.swiglu_limit:
        return
    known = "swiglu_limit" in inspect.signature(package.moe.fused_moe).parameters
    release = release_of(package.version)
    imitated = not case.emulate or release is None or release >= Version(LIMIT_SINCE)
    if not (known and imitated):
        message = f"swiglu_limit = {case.swiglu_limit:g}: fused_moe of aiter {package.version} has no such parameter; "
        message += f"use {LIMIT_SINCE} or later"
        raise Unsupported(message)


def check_honoured(case: Case, release: str) -> None:
    """Refuse arguments that `release` takes and its kernels for bf16 and per_1x128 do not read (docs/aiter.md).

    Raises:
        Unsupported: names the argument, and where it is computed.
    """
    known = release_of(release)
    ignored = {
        f"activation swiglu: before {SWIGLU_SINCE} its kernels for {case.dispatch_dtype} rows compute gelu instead": (
            case.activation == "swiglu" and known is not None and known < Version(SWIGLU_SINCE)
        ),
        f"swiglu_limit: its kernels for {case.dispatch_dtype} rows ignore it": bool(case.swiglu_limit),
        f"bias: its kernels for {case.dispatch_dtype} rows ignore it": case.bias,
    }
    for what, is_so in ignored.items():
        if is_so:
            message = f"experts aiter: {what}; use experts reference, or --emulate"
            raise Unsupported(message)


def _refuse(message: str) -> None:
    raise InvalidCase(message)
