"""Search for the fastest kernels of a layer on this device, among those that give the oracle's bits.

Bits are checked with an exact workload, times measured with a gaussian one: matrix units run faster on zeros.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from functools import partial

import torch

from distbench.errors import DistbenchError, Unsupported
from distbench.experts.triton.adapter import TritonExperts
from distbench.experts.triton.config import ConfigSelector, KernelConfig, LayerShape, TableRow, Tile
from distbench.tools.tune.candidates import Family, First
from distbench.tools.tune.trial import graph_us, make_layer, run
from distbench.utils.text import counted


class Tuner:
    """Tunes buckets of one layer."""

    def __init__(self, shape: LayerShape, note: Callable[[str, int, int], None], warn: Callable[[str], None]) -> None:
        """Make the layers; `note` receives the work, done and total, `warn` what is wrong with a candidate."""
        self._shape = shape
        self.note, self.warn = note, warn
        note("making the exact and the gaussian layer", 0, 0)
        self.exact, self.timed = make_layer(shape, "exact"), make_layer(shape, "gaussian")
        self.experts = TritonExperts(ConfigSelector(shape=shape)), TritonExperts(ConfigSelector(shape=shape))

    def tune(self, bucket: int, tried: Iterable[Family]) -> TableRow:
        """Return the fastest correct choice for `bucket` live rows in a buffer of the same size.

        Raises:
            Unsupported: no candidate gives the oracle's bits.
        """
        problem = _Problem(self, bucket)
        rows = [row for family in tried if (row := problem.best(family)) is not None]
        if not rows:
            message = f"tune: no kernel gives the oracle's bits for {counted(bucket, 'row')} of {self._shape}"
            raise Unsupported(message)
        return min(rows, key=lambda row: row.us or 0.0)


class _Problem:
    """One bucket: its rows, their expected results, and the time of a choice."""

    def __init__(self, tuner: Tuner, bucket: int) -> None:
        self._tuner = tuner
        self._bucket = bucket
        device = tuner.exact.local.mask.device
        self._live = torch.tensor([bucket], dtype=torch.int32, device=device)
        self._exact_rows, self._timed_rows = tuner.exact.received(bucket), tuner.timed.received(bucket)
        self._expected = tuner.exact.workload.expected_rows(0, self._exact_rows)

    def best(self, family: Family) -> TableRow | None:
        """Choose the second stage with the first candidate of stage 1, then stage 1 with that second stage."""
        if not family.first or not family.second:
            return None
        second = self._fastest(family, [(family.first[0], tile) for tile in family.second])
        if second is None:
            return None
        first = self._fastest(family, [(one, second[1]) for one in family.first])
        if first is None:
            return None
        config = family.config(*first[:2])
        return TableRow(bucket=self._bucket, config=config, us=round(first[2], 1))

    def _fastest(self, family: Family, pairs: list[tuple[First, Tile]]) -> tuple[First, Tile, float] | None:
        timed = []
        for number, pair in enumerate(pairs, 1):
            config = family.config(*pair)
            what = f"{counted(self._bucket, 'row')}, tiles of {family.block_m}, {config.name1} {config.name2}"
            self._tuner.note(what, number - 1, len(pairs))
            micros = self._micros(config)
            if micros is not None:
                timed.append((*pair, micros))
        return min(timed, key=lambda entry: entry[2], default=None)

    def _micros(self, config: KernelConfig) -> float | None:
        """Return the median time of a whole call; None if the bits are wrong, or the device refuses the kernel."""
        tuner = self._tuner
        exact, timed = tuner.experts
        try:
            output = run(exact, tuner.exact.local, self._exact_rows, self._live, config)
        except DistbenchError:
            raise
        except Exception as error:  # noqa: BLE001 - Triton has many exceptions, which need no distinction here
            tuner.warn(f"refused: {config.name1} {config.name2}: {error}")
            return None
        if self._expected is None or not torch.equal(output.view(torch.int16), self._expected.view(torch.int16)):
            tuner.warn(f"WRONG BITS: {config.name1} {config.name2}")
            return None
        return statistics.median(graph_us(partial(run, timed, tuner.timed.local, self._timed_rows, self._live, config)))
