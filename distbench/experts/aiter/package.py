"""The package aiter, or its stand-in: imported when a case asks for it, and what it is set to."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from distbench.case import Case
from distbench.errors import InvalidCase, Unsupported

DISTRIBUTION = "amd-aiter"
PACKAGE = "aiter"
STAND_IN = "distbench.emulation.aiter"
TABLE_VARIABLE = "AITER_CONFIG_FMOE"
INSTALL = (
    "run in a ROCm container that has it, or install amd-aiter for this ROCm (docs/amd.md); "
    "--emulate takes distbench's stand-in"
)


class AiterPackage(NamedTuple):
    """The modules of aiter that are called here, or those of its stand-in."""

    version: str
    root: Any
    moe: Any
    shuffle: Any
    core: Any
    chip: Any


def check_available(case: Case) -> None:
    """Refuse, without loading anything heavy, what cannot be run here.

    Raises:
        Unsupported: aiter is not installed.
        InvalidCase: habits that the stand-in does not have, or habits of the real one.

    """
    if case.emulate:
        try:
            importlib.import_module(f"{STAND_IN}.habits").parse_habits(case.aiter_habits)
        except ValueError as error:
            _refuse(f"aiter_habits = {case.aiter_habits!r:.80}: {error}")
        return
    if case.aiter_habits:
        _refuse(f"aiter_habits = {case.aiter_habits!r:.80}: only the stand-in can be told; add --emulate")
    if importlib.util.find_spec(PACKAGE) is None:
        message = f"experts aiter: the package {DISTRIBUTION} is not installed; {INSTALL}"
        raise Unsupported(message)


def installed_tables(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return the tuned tables that the installed aiter would take, without importing it; none where it is missing.

    AITER_CONFIG_FMOE replaces the release's own set: configs/tuned_fmoe.csv and those of model_configs.
    """
    named = environ.get(TABLE_VARIABLE, "")
    spec = importlib.util.find_spec(PACKAGE)
    if named or spec is None or not spec.submodule_search_locations:
        return [part for part in named.split(os.pathsep) if part]
    configs = Path(spec.submodule_search_locations[0]) / "configs"
    own = [configs / "tuned_fmoe.csv", *sorted((configs / "model_configs").glob("*tuned_fmoe*.csv"))]
    return [str(path) for path in own if path.is_file() and "untuned" not in path.name]


def installed_release() -> str:
    """Return the version of the installed aiter, empty where there is none."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return ""


def load_package(root: str) -> AiterPackage:
    """Import aiter, or the package at `root` with its modules.

    Raises:
        Unsupported: it cannot be imported, as without a HIP toolchain or a GPU; says what to install.

    """
    names = ("", ".fused_moe", ".ops.shuffle", ".jit.core", ".jit.utils.chip_info")
    try:
        modules = [importlib.import_module(root + name) for name in names]
    except Exception as error:  # aiter compiles and asks the device while it is imported: anything may come
        message = f"experts aiter: cannot be imported ({type(error).__name__}: {error!s:.200}); {INSTALL}"
        raise Unsupported(" ".join(message.split())) from error
    return AiterPackage(installed_version(root, modules[0]), *modules)


def installed_version(root: str, module: Any) -> str:
    """Return the version of the package at `root`, by which its selection rules are chosen.

    Raises:
        Unsupported: an aiter that was put into the path without being installed.

    """
    if root == STAND_IN:
        return str(module.habits.assumed().version)
    version = installed_release()
    if not version:
        message = f"experts aiter: {PACKAGE} can be imported, but no {DISTRIBUTION} is installed, so its version and "
        message += "rules are unknown; install it with pip"
        raise Unsupported(message)
    return version


def tuned_tables(package: AiterPackage) -> list[str]:
    """Return the tables that aiter takes tuned rows from; merged ones lie in a file of its own."""
    path = getattr(package.core, "AITER_CONFIG_FMOE_FILE", None)
    if path is None:
        path = getattr(getattr(package.core, "AITER_CONFIGS", None), "AITER_CONFIG_FMOE_FILE", "")
    return [part for part in str(path).split(os.pathsep) if part]


def check_settings(case: Case, version: str, environ: Mapping[str, str] = os.environ) -> None:
    """Refuse what the case says of aiter where the real one does not follow it.

    Raises:
        InvalidCase: another release or another table than the installed one uses, or habits, which stand-ins have.

    """
    if case.aiter_version not in ("", version):
        _refuse(f"aiter_version = {case.aiter_version!r}: {version} is installed; drop the key, or install that one")
    if case.kernel_table and case.kernel_table != environ.get(TABLE_VARIABLE):
        _refuse(
            f"kernel_table = {case.kernel_table!r}: aiter reads its table when it is imported; set "
            f"{TABLE_VARIABLE}={case.kernel_table} for the launch too"
        )


def _refuse(message: str) -> None:
    raise InvalidCase(message)
