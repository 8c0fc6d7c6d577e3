"""`distbench profiles`: the values that production's programs set of a case, by name, with their sources."""

from __future__ import annotations

import argparse
from typing import Any

from distbench.case.profiles import PROFILES, Profile
from distbench.case.spec import FIELD_DEFAULTS
from distbench.case.suite import value_text
from distbench.report.terminal import print_line, print_table


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "profiles", description="List the profiles of production's programs, or one's values."
    )
    command.set_defaults(command=_profiles)
    command.add_argument("profile", nargs="?", choices=tuple(PROFILES), metavar="NAME", help="profile to show")


def _profiles(options: argparse.Namespace) -> int:
    if options.profile:
        _show(PROFILES[options.profile])
        return 0
    columns = ("profile", "kernel", "geometry", "cut", "caller")
    print_table([(name, *_summary(profile)) for name, profile in PROFILES.items()], columns)
    for name, profile in PROFILES.items():
        print_line(f"{name}: {profile.about}")
    print_line("a profile sets defaults only; distbench profiles NAME shows its values and where they were read")
    return 0


def _summary(profile: Profile) -> tuple[str, ...]:
    keys = ("mori_kernel", "mori_geometry", "limit")
    return (*(str(profile.values[key].value) for key in keys), profile.caller or "none")


def _show(profile: Profile) -> None:
    values = profile.values.items()
    rows = [(key, value_text(one.value), value_text(FIELD_DEFAULTS[key])) for key, one in values]
    print_table(rows, ("key", "profile", "without it"))
    for key, one in values:
        print_line(f"{key}: {one.source}")
    print_line(f"caller: {profile.caller or f'none, {profile.no_caller}'}")
