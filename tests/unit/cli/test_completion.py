"""Completion in the shells themselves: bash always, zsh and fish where they are installed."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from distbench.cli.main import COMMANDS, main

LINES = [
    (["su"], {"suite", "suites"}),
    (["run", "--li"], {"--limit"}),
    (["run", "--model", "ti"], {"tiny", "tiny-odd"}),
    (["sweep", "--policy", ""], {"strict", "unchecked", "guard"}),
    (["run", "--case", "ca"], {"case.toml"}),
    (["suite", "smo"], {"smoke"}),
    (["suite", "ca"], {"capacity", "case.toml"}),
    (["faults", "ha"], {"hang"}),
    (["completion", ""], {"bash", "zsh", "fish"}),
    (["run", "--help", "--profil"], {"--profile"}),
]
# Calls the function that the script has registered, as bash does when Tab is pressed.
_PRESS_TAB = """
source ./script
f=$(complete -p distbench); f=${f##*-F }; f=${f%% *}
COMP_WORDS=(distbench "$@"); COMP_CWORD=$#; COMPREPLY=()
COMP_LINE="${COMP_WORDS[*]}"; COMP_POINT=${#COMP_LINE}
$f distbench "${COMP_WORDS[$#]}" "${COMP_WORDS[$#-1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


def script(folder: Path, capsys: pytest.CaptureFixture[str], shell: str) -> Path:
    """Write a shell's script into a folder that holds a case file; return its path."""
    assert main(["completion", shell]) == 0
    (folder / "case.toml").touch()
    path = folder / "script"
    path.write_text(capsys.readouterr().out)
    return path


def needs(shell: str) -> str:
    found = shutil.which(shell)
    if found is None:
        pytest.skip(f"{shell} is not installed")
    return found


def test_bash_completes_commands_options_names_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script(tmp_path, capsys, "bash")
    for words, expected in LINES:
        command = [needs("bash"), "--norc", "-c", _PRESS_TAB, "bash", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
        assert set(done.stdout.split()) == expected, words


def test_fish_completes_commands_options_names_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fish = needs("fish")
    script(tmp_path, capsys, "fish")
    for words, expected in LINES:
        line = " ".join(["distbench", *words])
        command = [fish, "--no-config", "-c", f"source ./script; complete -C '{line}'"]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=tmp_path, env=os.environ | {"HOME": str(tmp_path)}
        )
        assert {one.partition("\t")[0] for one in done.stdout.splitlines()} == expected, words


def test_zsh_completes_commands_options_names_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    zsh = needs("zsh")
    script(tmp_path, capsys, "zsh").rename(tmp_path / "_distbench")
    pid, terminal = pty.fork()
    if not pid:
        os.chdir(tmp_path)
        os.execve(zsh, [zsh, "-f", "-i"], os.environ | {"HOME": str(tmp_path), "TERM": "dumb", "PS1": "> "})  # noqa: S606
    try:
        type_in(
            terminal, f"fpath=({tmp_path} $fpath); autoload -Uz compinit; compinit -u -D; echo rea''dy\n", "ready\r\n"
        )
        for typed, completed in (
            ("distbench suite smo\t", "smoke"),
            ("distbench run --polic\t", "--policy"),
            ("distbench run --case cas\t", "case.toml"),
            ("distbench faults han\t", "hang"),
            ("distbench prese\t", "presets"),
        ):
            assert completed in type_in(terminal, typed, completed), typed
            type_in(terminal, "\x15", "")
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        os.close(terminal)


def type_in(terminal: int, text: str, expected: str) -> str:
    """Type into a terminal, and return what it shows once that has what is expected, or a minute later."""
    os.write(terminal, text.encode())
    shown, deadline = "", time.monotonic() + 60
    while time.monotonic() < deadline and (not expected or expected not in shown):
        if not select.select([terminal], [], [], 0.3)[0]:
            if not expected:
                break
            continue
        shown += os.read(terminal, 1 << 16).decode(errors="replace")
    return shown


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_script_has_every_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert all(name in text for group in COMMANDS.values() for name in group)


def test_unknown_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "csh"]) == 2
    assert "invalid choice: 'csh'" in capsys.readouterr().err
