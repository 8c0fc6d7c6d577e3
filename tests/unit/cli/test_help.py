"""Help text of every command."""

from __future__ import annotations

import re

import pytest

from distbench.cli.main import main


def help_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_every_command_has_a_help_text(capsys: pytest.CaptureFixture[str]) -> None:
    commands = re.findall(r"^    (\w+)", help_of(capsys), re.MULTILINE)
    assert len(commands) >= 15
    for command in commands:
        assert help_of(capsys, command).startswith("usage: ")
