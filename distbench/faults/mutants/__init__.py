"""The corpus: broken kernels, transports, cuts and combines, as small patches at named seams (docs/mutants.md)."""

from __future__ import annotations

from distbench.faults.mutants.activation import ACTIVATION
from distbench.faults.mutants.arguments import ARGUMENTS
from distbench.faults.mutants.corpus import Mutant
from distbench.faults.mutants.coverage import K_COVERAGE, N_COVERAGE
from distbench.faults.mutants.numbers import PRECISION, ROUNDING
from distbench.faults.mutants.overwritten import OVERWRITTEN
from distbench.faults.mutants.routing import IDS, WEIGHTS
from distbench.faults.mutants.rows import ORDER, TAILS, TILES
from distbench.faults.mutants.scales import SCALES
from distbench.faults.mutants.stale import STALE
from distbench.faults.mutants.transport import COMBINE, CUT, DISPATCH

CLASSES = (
    ACTIVATION,
    K_COVERAGE,
    N_COVERAGE,
    TILES,
    TAILS,
    SCALES,
    WEIGHTS,
    IDS,
    ORDER,
    PRECISION,
    ROUNDING,
    STALE,
    OVERWRITTEN,
    COMBINE,
    DISPATCH,
    CUT,
    ARGUMENTS,
)

CORPUS: dict[str, Mutant] = {mutant.name: mutant for one in CLASSES for mutant in one.mutants}
