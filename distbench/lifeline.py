"""Loaded first by the process that ranks are forked from, so that it ends with the supervisor, and they with it.

On its own it would end only after the last rank, since each rank holds the pipe by which it notices.
"""

from __future__ import annotations

from distbench.process import die_with_parent

die_with_parent()
