"""Layout of the probes of an exact layer: code columns, groups, kinds of rows. Loads no torch.

A probe row is an intermediate row whose gate or up value is one of many numbers. A probe column is an output column
that reads one probe row and nothing else, so no order of additions changes its bits. Rows and columns fall into groups.
A token has 1 in one of the code columns, and the code names the group in which each expert is switched on for the
token; in the other groups the expert gives an exact zero. A code column under which two experts of the token share a
group is not used for it, so at most one expert contributes to each group.
"""

from __future__ import annotations

import math
from functools import lru_cache

import msgspec

_LEAST_CODES = 8
# With this number of code columns per group, an expert is on in all but about one in twenty groups under some column.
_CODES_OF_A_GROUP = 3
_NO_CODE = 1e-4
_LARGEST_CODE_SHARE = 4
_WIDE_SHARE = 4
_HOT_SLOTS = 2


class Code(msgspec.Struct, frozen=True, kw_only=True):
    """Code of a layer: `columns` map experts to `groups`; `missing` is the share of tokens without a code column."""

    groups: int
    columns: int
    missing: float


class ProbePlan(msgspec.Struct, frozen=True, kw_only=True):
    """Layout of probes by kind: gate, wide gate, up, wide up, hot; row r and column c are in group r, c mod G.

    `live_groups` G is the number of groups that have rows and columns; `rows` and `columns` are multiples of it. A gate
    row has a payload in its gate and the switch in its up; an up row has them the other way round. Wide rows read one
    wide column. Hot rows, one in each group, make a block of a combine in fp8 blocks large enough to be scaled.
    """

    code: Code
    live_groups: int
    rows: int
    columns: int
    wide_gate_rows: int
    wide_up_rows: int
    hot_rows: int

    @property
    def up_rows(self) -> int:
        """Number of rows with a payload in their up values: a quarter."""
        return (self.rows - self.hot_rows) // 4 - self.wide_up_rows

    @property
    def gate_rows(self) -> int:
        """Number of rows with a payload in their gate."""
        return self.rows - self.hot_rows - self.wide_up_rows - self.up_rows - self.wide_gate_rows

    @property
    def first_up_row(self) -> int:
        """First row that has the switch in its gate."""
        return self.gate_rows + self.wide_gate_rows

    @property
    def row_slots(self) -> int:
        """Rows per group."""
        return self.rows // self.live_groups

    @property
    def column_slots(self) -> int:
        """Columns per group."""
        return self.columns // self.live_groups


@lru_cache(maxsize=64)
def plan_code(num_experts: int, topk: int, hidden_size: int) -> Code:
    """Return the code with the fewest groups that leaves at most one token in 10,000 of a uniform routing without one.

    At most a quarter of the hidden columns are code columns; where these are too few, the code that misses least is
    returned.
    """
    topk = min(topk, num_experts)
    most = max(hidden_size // _LARGEST_CODE_SHARE, 1)
    codes = []
    for groups in (2 * topk, 4 * topk, 8 * topk):
        share = _distinct(num_experts, topk, groups)
        wanted = _LEAST_CODES if share == 1 else math.ceil(math.log(_NO_CODE) / math.log1p(-share))
        columns = min(max(_LEAST_CODES, _CODES_OF_A_GROUP * groups, wanted), most)
        codes.append(Code(groups=groups, columns=columns, missing=(1 - share) ** columns))
        if wanted <= most:
            return codes[-1]
    return min(codes, key=lambda code: code.missing)


def plan_probes(  # noqa: PLR0913 - the bounds on probes
    code: Code, *, rows: int, columns: int, wide_columns: int, hot: bool, share: float
) -> ProbePlan | None:
    """Return the probes that take `share` of these rows and columns; None where less than one row per group is left."""
    columns, rows = int(columns * share), int(rows * share)
    rows = min(rows, columns)
    groups = min(code.groups, rows)
    if groups < 1:
        return None
    rows -= rows % groups
    hot_rows = groups if hot and rows >= _HOT_SLOTS * groups else 0
    up_rows = (rows - hot_rows) // 4
    return ProbePlan(
        code=code,
        live_groups=groups,
        rows=rows,
        columns=columns - columns % groups,
        wide_gate_rows=min(wide_columns, (rows - hot_rows - up_rows) // _WIDE_SHARE),
        wide_up_rows=min(wide_columns, up_rows // _WIDE_SHARE),
        hot_rows=hot_rows,
    )


def _distinct(num_experts: int, topk: int, groups: int) -> float:
    """Return the probability that `topk` experts are all in different groups: e_k of the groups' sizes over C(E, k)."""
    ways = [1] + [0] * topk
    for group in range(min(groups, num_experts)):
        size = (num_experts - group + groups - 1) // groups
        for chosen in range(topk, 0, -1):
            ways[chosen] += ways[chosen - 1] * size
    return ways[topk] / math.comb(num_experts, topk)
