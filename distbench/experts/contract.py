"""A plugin's experts, held to the contract: what breaks it is named, by the rule, on the rank where it happens."""

from __future__ import annotations

from typing import Any

import msgspec
import torch
from torch import Tensor

from distbench.case.contract import Contract, check_stated
from distbench.case.plugins import Plugin
from distbench.experts.base import ExpertInput, Experts, ExpertsAround, ExpertsContext, ExpertWeights
from distbench.experts.roundings import Roundings
from distbench.experts.selection.choice import KernelChoice


class CheckedExperts(ExpertsAround):
    """A plugin's experts, whose results are checked by shape, dtype and device; no device is waited for.

    Values are checked as those of any experts.
    """

    def __init__(self, context: ExpertsContext, plugin: Plugin) -> None:
        """Make the experts.

        Raises:
            BrokenContract: `make` raises, or returns anything else.
        """
        self._name = context.case.experts
        self._contract = Contract("experts", self._name)
        self._case, self._plugin = context.case, plugin
        made = self._contract.call("experts.made", plugin.make, context)
        if not isinstance(made, Experts):
            self._contract.refuse("experts.made", f"make returned a {type(made).__name__}")
        super().__init__(made)
        self._contract.call("experts.facts", lambda: msgspec.json.encode(self.about()))

    def selection(self, rows: int) -> KernelChoice:
        """See `Experts.selection`.

        Raises:
            BrokenContract: an error, or anything but the choice for these rows.
        """
        choice = self._contract.call("experts.selection", self.inner.selection, rows)
        if not isinstance(choice, KernelChoice) or choice.rows != rows:
            told = f"a choice for {choice.rows}" if isinstance(choice, KernelChoice) else f"a {type(choice).__name__}"
            self._contract.refuse("experts.selection", f"for {rows} rows it returned {told}")
        return choice

    def roundings(self, choice: KernelChoice) -> Roundings | None:
        """See `Experts.roundings`.

        Raises:
            BrokenContract: an error, or anything else.
        """
        found = self._contract.call("experts.roundings", self.inner.roundings, choice)
        if not isinstance(found, Roundings | None):
            self._contract.refuse("experts.roundings", f"it returned a {type(found).__name__}")
        return found

    def __call__(self, given: ExpertInput, weights: ExpertWeights) -> Tensor:
        """See `Experts.__call__`.

        Raises:
            BrokenContract: an error, or rows that are not as the contract has them.
        """
        rows = self._contract.call("experts.returns", self.inner, given, weights)
        if not isinstance(rows, Tensor):
            self._contract.refuse("experts.shape", f"they returned a {type(rows).__name__}")
        right = [given.rows, weights.w2.shape[1]]
        if list(rows.shape) != right:
            self._contract.refuse("experts.shape", f"rows: {list(rows.shape)} instead of {right}")
        if rows.dtype != torch.bfloat16:
            self._contract.refuse("experts.dtype", f"rows: {rows.dtype} instead of bfloat16".replace("torch.", ""))
        if rows.device != given.hidden.device:
            self._contract.refuse("experts.device", f"rows: {rows.device} instead of {given.hidden.device}")
        return rows

    def warm_up(self, weights: ExpertWeights, rows: tuple[int, ...]) -> None:
        """See `Experts.warm_up`.

        Raises:
            Unsupported: the plugin does not state the device.
        """
        check_stated(self._plugin, "experts", self._case, weights.w1.device.type)
        self._contract.call("experts.returns", self.inner.warm_up, weights, rows)

    def about(self) -> dict[str, Any]:
        """See `Experts.about`."""
        return self.inner.about() | {f"experts {self._name}": self._plugin.about()}
