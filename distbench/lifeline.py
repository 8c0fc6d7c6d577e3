"""Preloaded by the fork server, so that it ends with the supervisor, and the forked ranks end with it.

Without this it would end only after the last rank, since each rank holds the pipe whose EOF it waits for.
"""

from __future__ import annotations

from distbench.utils.process import die_with_parent

die_with_parent()
