"""Remove the guards between a case and MoRI: the adapter's and those before it.

With DISTBENCH_TEST_UNGUARDED=1 sitecustomize.py does this to every process of a launch. The outcome of a case is then
what the stand-in's release, or its quirk, makes of it. A case with the seed MISTAKEN passes to combine the ids that
dispatch returned, as callers have; where there is no barrier after construction, one rank allocates after the others.
"""

from __future__ import annotations

import os
import time
from typing import Any
from unittest.mock import patch

from distbench.case.stages import Stage
from distbench.distributed.heartbeat import Heartbeat

MISTAKEN = 475
_LATE_RANK, _LATE_S = "1", 0.5


def remove_guards() -> None:
    """Remove the guards in this process, and in a rank once it has loaded the modules."""
    for name in ("_check_kernel", "_check_cap"):
        patch(f"distbench.transport.mori.config.{name}", lambda *_: None).start()
    mark = Heartbeat.mark
    loosened: list[bool] = []

    def marked(heartbeat: Heartbeat, stage: Stage) -> None:
        mark(heartbeat, stage)
        if stage == Stage.AGREE and not loosened:
            loosened.append(True)
            _loosen()

    patch.object(Heartbeat, "mark", marked).start()


def _loosen() -> None:
    from distbench.transport.mori.emulated import moves, quirks  # noqa: PLC0415 - only ranks load torch
    from distbench.transport.mori.transport import MoriTransport  # noqa: PLC0415

    allocate, take, combine = vars(moves)["allocate"], MoriTransport._take_known, MoriTransport.combine  # noqa: SLF001

    def late(*arguments: Any) -> Any:
        if quirks.has(quirks.NO_CONSTRUCTOR_BARRIER) and os.environ["RANK"] == _LATE_RANK:
            time.sleep(_LATE_S)
        return allocate(*arguments)

    def taken(transport: Any, ids: Any) -> Any:
        known = take(transport, ids)
        if transport._case.seed != MISTAKEN:  # noqa: SLF001
            return known
        received = transport._op._buffers.ids.view(transport.capacity, ids.shape[1], ids.dtype)  # noqa: SLF001
        return known._replace(routing=received)

    changes: dict[str, Any] = {
        "_wait_for_all": lambda _: None,
        "forget": lambda _: None,
        "_count": lambda transport: int(transport._total_recv),  # noqa: SLF001
        "_take_known": taken,
        "combine": lambda transport, rows, ids: combine(transport, rows, ids)[: ids.shape[0]],
    }
    for name, change in changes.items():
        patch.object(MoriTransport, name, change).start()
    patch.object(moves, "allocate", late).start()
    patch("distbench.pipeline.run_case.check_capacity", lambda *_: None).start()
