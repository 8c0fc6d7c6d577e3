"""What the fork server loads before it forks ranks; only this process and the ranks import it.

It ends with the supervisor, and the forked ranks end with it. Without that it would end only after the last rank, since
each rank holds the pipe whose EOF it waits for.

Ranks keep sharing its memory: garbage collection writes to every object that it visits, and a page that a rank writes
to becomes its own, some 30 MiB of each rank. Frozen objects are skipped.
"""

from __future__ import annotations

import gc

from distbench.utils.process import die_with_parent

die_with_parent()

import distbench.launcher.worker  # noqa: E402, F401 - torch takes a second to load, in which the supervisor may end

gc.collect()
gc.freeze()
