"""Inputs and oracle that recorded rows are compared with: generated on this machine, or as recorded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from distbench.case.spec import Case
from distbench.pipeline.inputs import workload_for
from distbench.report.bundle.findings import INPUTS, StageFinding
from distbench.report.bundle.recorded import ArmRows, RankTensors
from distbench.verify.row_compare import differing
from distbench.workload.batch import TokenBatch


class References(Protocol):
    """Inputs and oracle of a bundle's case."""

    def inputs(self, rank: int, routing: Tensor, recorded: RankTensors | None) -> StageFinding:
        """Compare the routing of `rank`, and the experts of its tokens; None where it recorded no tokens."""

    def kept(self, rank: int, recorded: RankTensors) -> StageFinding:
        """Compare the tokens that `rank` recorded."""

    def sent(self, rank: int, recorded: RankTensors) -> TokenBatch:
        """Return the recorded tokens of `rank` as it had to send them."""

    def combined(self, recorded: RankTensors, sent: TokenBatch) -> Tensor | None:
        """Return the expected tokens, bf16 [n, H]; None where bits may vary."""

    def received(self, sources: Tensor) -> tuple[Tensor, TokenBatch]:
        """Return the places of rows with `sources` [m, 2] whose token is known, int64 [n], and these tokens."""

    def expert_rows(self, rank: int, rows: ArmRows, received: TokenBatch) -> Tensor | None:
        """Return the expected expert rows of `rank`, bf16 [m, H]; None where bits may vary."""


class Generated:
    """Inputs and oracle generated on this machine."""

    def __init__(self, case: Case) -> None:
        """Keep the workload of `case`, which runs with one kind of inputs."""
        self._workload = workload_for(case, torch.device("cpu"))

    def inputs(self, rank: int, routing: Tensor, recorded: RankTensors | None) -> StageFinding:
        """Compare the recorded routing with a generated one."""
        del recorded
        return _finding(rank, differing(routing, self._workload.routing_of(rank, len(routing))).any(1))

    def kept(self, rank: int, recorded: RankTensors) -> StageFinding:
        """Compare the recorded tokens with generated ones."""
        return _finding(rank, _any_field_differs(recorded.sent, self.sent(rank, recorded)))

    def sent(self, rank: int, recorded: RankTensors) -> TokenBatch:
        """Return the tokens, generated again."""
        return self._workload.tokens(rank, recorded.tokens)

    def combined(self, _: RankTensors, sent: TokenBatch) -> Tensor | None:
        """Return the oracle of `sent`."""
        return self._workload.expected(sent)

    def received(self, sources: Tensor) -> tuple[Tensor, TokenBatch]:
        """Return all places, and the tokens of `sources`, generated again."""
        return torch.arange(len(sources)), self._workload.token_rows(*sources.unbind(1))

    def expert_rows(self, rank: int, _: ArmRows, received: TokenBatch) -> Tensor | None:
        """Return the oracle of the tokens `received`."""
        return self._workload.expected_rows(rank, received)


class SentTokens(NamedTuple):
    """Tokens that one rank recorded as it sent them: numbers int64 [n], and rows."""

    rank: int
    numbers: Tensor
    batch: TokenBatch


class AsRecorded:
    """Inputs and oracle as the ranks recorded them, for inputs that this version does not generate.

    Nothing shows whether they were right: a rank whose own inputs were damaged before it sent them is not found.
    """

    def __init__(self, sent: Sequence[SentTokens], *, exact: bool) -> None:
        """Keep the tokens of all parts that are present; with `exact` inputs every part has to hold its oracle."""
        tokens = [(part.rank, number) for part in sent for number in part.numbers.tolist()]
        self._place = {token: place for place, token in enumerate(tokens)}
        self._sent = [part.batch for part in sent]
        self._exact = exact

    def inputs(self, rank: int, routing: Tensor, recorded: RankTensors | None) -> StageFinding:
        """Compare the experts of the recorded tokens with the recorded routing, as far as it goes."""
        wrong = torch.zeros(0, dtype=torch.bool)
        if recorded is not None:
            routed = recorded.tokens < len(routing)
            wrong = differing(recorded.sent.ids[routed], routing[recorded.tokens[routed]]).any(1)
        return _finding(rank, wrong)

    def kept(self, rank: int, _: RankTensors) -> StageFinding:
        """Return that nothing was compared."""
        return _finding(rank, torch.zeros(0, dtype=torch.bool))

    def sent(self, _: int, recorded: RankTensors) -> TokenBatch:
        """Return the tokens as recorded."""
        return recorded.sent

    def combined(self, recorded: RankTensors, _: TokenBatch) -> Tensor | None:
        """Return the recorded oracle of the tokens."""
        return self._oracle("token.oracle", recorded.oracle)

    def received(self, sources: Tensor) -> tuple[Tensor, TokenBatch]:
        """Return the places of rows whose source recorded the token, and these tokens."""
        found = torch.tensor(
            [self._place.get((rank, token), -1) for rank, token in sources.tolist()], dtype=torch.int64
        )
        known = found >= 0
        chosen = found[known]
        scales = [batch.scales for batch in self._sent if batch.scales is not None]
        batch = TokenBatch(
            hidden=torch.cat([batch.hidden for batch in self._sent])[chosen],
            scales=torch.cat(scales)[chosen] if scales else None,
            weights=torch.cat([batch.weights for batch in self._sent])[chosen],
            ids=torch.cat([batch.ids for batch in self._sent])[chosen],
        )
        return known.nonzero().flatten(), batch

    def expert_rows(self, _: int, rows: ArmRows, _received: TokenBatch) -> Tensor | None:
        """Return the recorded oracle of the rows."""
        return self._oracle(f"{rows.arm}.oracle", rows.oracle)

    def _oracle(self, name: str, oracle: Tensor | None) -> Tensor | None:
        if self._exact and oracle is None:
            message = f"there is no {name}, and its inputs are of another version than those generated here"
            raise ValueError(message)
        return oracle if self._exact else None


def _finding(rank: int, wrong: Tensor) -> StageFinding:
    return StageFinding(rank=rank, arm="", stage=INPUTS, rows=len(wrong), wrong=int(wrong.sum()))


def _any_field_differs(actual: TokenBatch, expected: TokenBatch) -> Tensor:
    """Whether any field of each row differs: bool [n]."""
    pairs = zip(actual, expected, strict=True)
    found = [differing(one, other).any(1) for one, other in pairs if one is not None and other is not None]
    return torch.stack(found).any(0)
