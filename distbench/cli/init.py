"""`distbench init`: a commented case or suite file to start from, or the launch files."""

from __future__ import annotations

import argparse
from importlib import resources
from pathlib import Path
from typing import Any

from distbench.case.presets import PRESETS
from distbench.case.templates import case_template, suite_template
from distbench.errors import InvalidCase, Unsupported
from distbench.report.terminal import print_line

_SUFFIX = ".toml"
_LAUNCH = "launch"
_EXECUTABLE, _PLAIN = 0o755, 0o644


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "init",
        description="Write a commented file to start from: a case with every key, or with --suite a suite. With "
        "--launch write the folder of launch files. A file that exists is kept.",
    )
    command.add_argument(
        "file", metavar="FILE", nargs="?", help="the file (default: case.toml or suite.toml), or the folder (launch)"
    )
    kind = command.add_mutually_exclusive_group()
    kind.add_argument("--suite", action="store_true", help="a suite instead of a case")
    kind.add_argument(
        "--launch",
        action="store_true",
        help="files for torchrun, Slurm, Kubernetes, Docker, GitLab, GitHub, Jenkins, Prometheus and Grafana",
    )
    command.add_argument(
        "--model", choices=tuple(PRESETS), default="tiny", metavar="NAME", help="its layer (default: %(default)s)"
    )
    command.set_defaults(command=_init)


def _init(options: argparse.Namespace) -> int:
    if options.launch:
        return _write_launch_files(Path(options.file or _LAUNCH))
    kind = "suite" if options.suite else "case"
    path = Path(options.file or f"{kind}{_SUFFIX}")
    if path.suffix != _SUFFIX:
        message = f"init {path}: suffix {path.suffix!r}; the file is TOML, name it {path.with_suffix(_SUFFIX)}"
        raise InvalidCase(message)
    text = (suite_template if options.suite else case_template)(str(path), options.model)
    _write_new(path, text.encode())
    run = f"suite {path} -n 4" if options.suite else f"run --case {path}"
    print_line(f"{path}: a {kind} of the layer {options.model}; run it: distbench {run}")
    return 0


def _write_launch_files(folder: Path) -> int:
    """Write the launch files that came with this distbench; those that are there already, unchanged, stay.

    Raises:
        InvalidCase: a file is there with other content, or cannot be written; then none is written over.
        Unsupported: this installation came without them.

    """
    files = _launch_files()
    changed = [name for name, content in files.items() if _content(folder / name) not in (None, content)]
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        message = f"init {folder}: {folder / changed[0]}{more}: there with other content; name another folder"
        raise InvalidCase(message)
    for name, content in files.items():
        path = folder / name
        if not path.exists():
            _make_folder(path.parent)
            _write_new(path, content)
            path.chmod(_EXECUTABLE if content.startswith(b"#!") else _PLAIN)
    for name in files:
        print_line(str(folder / name))
    return 0


def _launch_files() -> dict[str, bytes]:
    """Content by path; `launch/` of a checkout is the same folder, by a link."""
    root = Path(str(resources.files("distbench"))) / _LAUNCH
    found = {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
    if not found:
        message = f"init --launch: no files in {root}; take the folder launch/ of distbench's repository"
        raise Unsupported(message)
    return found


def _content(path: Path) -> bytes | None:
    """Content of a file; None where it does not exist, empty where it cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError:
        return b""


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"init {path}: cannot be made ({error.strerror}); name another folder"
        raise InvalidCase(message) from error


def _write_new(path: Path, content: bytes) -> None:
    try:
        with path.open("xb") as file:
            file.write(content)
    except OSError as error:
        message = f"init {path}: cannot be written ({error.strerror}); name another file"
        raise InvalidCase(message) from error
