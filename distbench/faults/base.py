"""The interface of a fault: damage at one boundary of one stage, and the place where it takes effect."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from distbench.case.injection import Injection
from distbench.case.spec import Case
from distbench.case.stages import FAULT_ARMS, SUB_BATCHES, Arm
from distbench.distributed.heartbeat import Heartbeat
from distbench.errors import InvalidCase, Unsupported
from distbench.experts.base import ExpertInput, Experts
from distbench.faults.options import Option, one_of, rank_option
from distbench.transport.base import Dispatched, Transport
from distbench.workload.batch import TokenBatch

EVERYWHERE = "all"


class Scene(NamedTuple):
    """Surroundings of a fault: `sources` gives (source rank, source token) of the rows received last.

    `transport` and `experts` are the parts that it wraps; None where a case is only checked. With two-batch overlap
    `sub_batch` names the one that it is in, and `other` has the tokens of the other.
    """

    rank: int
    case: Case
    heartbeat: Heartbeat
    sources: Callable[[], Tensor]
    transport: Transport | None = None
    experts: Experts | None = None
    sub_batch: str = ""
    other: TokenBatch | None = None


class Fault:
    """Does nothing at any boundary; each fault overrides one or two of them. `hits` counts its changes.

    The class's docstring says what goes wrong. `bug` names the public reports that it represents, `stage` the first
    stage that is wrong. `verdict` is empty where it follows from the arm: BASELINE_WRONG in the padded one, else
    CORRUPT. `options` are its own keys with their defaults, in addition to `rank` and `arm`; `shape` lists case keys
    without which it has no effect. A `race` may show in some passes only: no self-test counts on it.
    `transport` is the only one that has it; empty for all.
    """

    name: ClassVar[str]
    bug: ClassVar[str]
    stage: ClassVar[str]
    verdict: ClassVar[str] = ""
    arm: ClassVar[str] = ""
    options: ClassVar[Mapping[str, Option]] = {}
    shape: ClassVar[Mapping[str, Any]] = {}
    needs: ClassVar[str] = "rows or tokens on its rank"
    race: ClassVar[bool] = False
    transport: ClassVar[str] = ""

    def __init__(self, scene: Scene, injection: Injection) -> None:
        """Take effect as `injection` says.

        Raises:
            InvalidCase: an unknown option, or a value that is not allowed.
            Unsupported: the case has another transport than the fault's.
        """
        self.scene = scene
        self.hits = 0
        self._visits = 0
        options = self.all_options(scene.case.ep_size)
        unknown = injection.options.keys() - options.keys()
        if unknown:
            message = f"inject = {self.name}: no option {min(unknown)!r}; allowed are {', '.join(options)}"
            raise InvalidCase(message)
        self.chosen = {key: _read(self.name, key, injection.options.get(key), one) for key, one in options.items()}
        if self.transport not in ("", scene.case.transport):
            message = f"inject = {self.name}: of transport {self.transport} alone; the case has {scene.case.transport}"
            raise Unsupported(message)

    @classmethod
    def all_options(cls, ranks: int) -> dict[str, Option]:
        """Return its own options and the common ones, for a case of `ranks` ranks."""
        arm = one_of(cls.arm, *(arm for arm in FAULT_ARMS if arm != cls.arm))
        both = one_of("", *SUB_BATCHES)
        return {"rank": rank_option(ranks, EVERYWHERE), "arm": arm, "sub_batch": both, **cls.options}

    @classmethod
    def wanted(cls, injection: Injection) -> str:
        """Return the conditions under which `injection` changes anything."""
        arm = injection.options.get("arm", cls.arm)
        cut = arm in (Arm.REPADDED, Arm.TRUNCATED) and "a limit" not in cls.needs
        return f"{cls.needs}, and a limit, for arm {arm}" if cut else cls.needs

    @property
    def active(self) -> bool:
        """Whether it takes effect on this rank, in the current arm."""
        rank, arm = self.chosen["rank"], self.chosen["arm"]
        here = rank == EVERYWHERE or int(rank) == self.scene.rank
        concerned = self.chosen["sub_batch"] in ("", self.scene.sub_batch)
        return here and concerned and arm in ("", self.scene.heartbeat.arm)

    def random(self, count: int) -> Tensor:
        """Return uniform numbers float64 [count]: new ones in each call, the same ones in each run of the case."""
        self._visits += 1
        case = self.scene.case
        text = f"{case.seed}/{self.name}/{self.scene.rank}/{self.scene.heartbeat.arm}/{self._visits}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")
        return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    def pick(self, count: int) -> int:
        """Return one of `count` numbers at random, and count a hit."""
        self.hits += 1
        return int(self.random(1) * count)

    def begin(self) -> None:
        """Called before a checked pass, while no rank dispatches."""

    def enter(self, stage: str) -> None:
        """Called when the rank begins a stage."""

    def sent(self, batch: TokenBatch) -> TokenBatch:
        """Damage a copy of dispatch's input."""
        return batch

    def received(self, dispatched: Dispatched) -> Dispatched:
        """Damage dispatch's output."""
        return dispatched

    def cut(self, dispatched: Dispatched, given: ExpertInput) -> ExpertInput:
        """Damage the cut."""
        return given

    def asked(self, given: ExpertInput) -> ExpertInput:
        """Damage the experts' view of their arguments."""
        return given

    def computed(self, given: ExpertInput, rows: Tensor) -> Tensor:
        """Damage the experts' output."""
        return rows

    def returned(self, rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Damage combine's input."""
        return rows, ids

    def combined(self, tokens: Tensor) -> Tensor:
        """Damage combine's output."""
        return tokens

    def accepted(self, outputs: Mapping[str, Tensor]) -> dict[str, bool]:
        """Return whether public rules accept this rank's tokens, by rule; `outputs` are bf16 [n, H] by arm."""
        return {}

    def leave(self) -> None:
        """Called after the last barrier of the case."""


def _read(name: str, key: str, text: str | None, option: Option) -> Any:
    if text is None:
        return option.default
    try:
        return option.read(text)
    except (ValueError, OverflowError) as error:
        message = f"inject = {name}: {key} = {text!r:.40}; allowed are {option.allowed}"
        raise InvalidCase(message) from error
