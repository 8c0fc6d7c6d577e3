"""Mutants of tiles, of tails and of the order of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from distbench.experts.base import ExpertInput
from distbench.experts.blocked_matmul import Weights
from distbench.experts.selection.choice import KernelChoice
from distbench.experts.steps import Group
from distbench.faults.mutants.corpus import Class, Site, by_next_expert, live, rare
from distbench.transport.base import Dispatched

TILES = Class("tiles")
TAILS = Class("tails")
ORDER = Class("order")
_tile, _tail, _order = TILES.at, TAILS.at, ORDER.at

_TILE = 32


def _last_of_each(group: Group) -> Tensor:
    """Return the position of each expert's last route, int64 [g]."""
    return (group.routes < group.total).sum(1) - 1


@_tile("second")
def second_tile_lost(site: Site, rows: Tensor, w2: Weights, group: Group, choice: KernelChoice) -> Tensor:
    """Rows 32 to 63 of each expert are zero."""
    made = site.right(rows, w2, group, choice)
    made[:, _TILE : 2 * _TILE] = 0
    return made


@_tile("second")
def second_tile_is_the_first(site: Site, rows: Tensor, w2: Weights, group: Group, choice: KernelChoice) -> Tensor:
    """Rows from 32 on of each expert read the intermediate from 32 rows before."""
    wrong = rows.clone()
    wrong[:, _TILE:] = rows[:, : max(rows.shape[1] - _TILE, 0)]
    return site.right(wrong, w2, group, choice)


@_tile("second")
def each_16th_row_lost(site: Site, rows: Tensor, w2: Weights, group: Group, choice: KernelChoice) -> Tensor:
    """The last row of each 16 of an expert is zero."""
    made = site.right(rows, w2, group, choice)
    made[:, 15::16] = 0
    return made


@_tile("second")
def tile_of_the_next_expert(site: Site, rows: Tensor, w2: Weights, group: Group, choice: KernelChoice) -> Tensor:
    """Rows from 32 on of each expert are multiplied by the weights of the next one."""
    made = site.right(rows, w2, group, choice)
    made[:, _TILE:] = by_next_expert(site, rows, w2, group, choice)[:, _TILE:]
    return made


@_tile("second")
def quarters_of_16_rows_swapped(site: Site, rows: Tensor, w2: Weights, group: Group, choice: KernelChoice) -> Tensor:
    """Rows 4 to 7 and 8 to 11 of each expert's first 16 are exchanged."""
    made = site.right(rows, w2, group, choice)
    if made.shape[1] >= 12:
        made[:, 4:12] = made[:, 4:12].roll(4, 1)
    return made


@_tile("second")
def tile_reversed(site: Site, rows: Tensor, w2: Weights, group: Group, choice: KernelChoice) -> Tensor:
    """An expert's first 8 rows are in reverse order."""
    made = site.right(rows, w2, group, choice)
    made[:, :8] = made[:, :8].flip(1)
    return made


@_tile("second")
def corner_of_a_tile_lost(site: Site, rows: Tensor, w2: Weights, group: Group, choice: KernelChoice) -> Tensor:
    """Rows from 32 on are zero in the last 64 columns."""
    made = site.right(rows, w2, group, choice)
    made[:, _TILE:, -64:] = 0
    return made


@_tile("second")
def grid_one_tile_short(site: Site, rows: Tensor, w2: Weights, group: Group, choice: KernelChoice) -> Tensor:
    """The last expert's last tile of 32 rows is not computed."""
    made = site.right(rows, w2, group, choice)
    last = int(_last_of_each(group)[-1])
    made[-1, last // _TILE * _TILE :] = 0
    return made


@_tile("second")
def last_expert_lost(site: Site, rows: Tensor, w2: Weights, group: Group, choice: KernelChoice) -> Tensor:
    """The rows of the last non-empty expert are zero."""
    made = site.right(rows, w2, group, choice)
    made[-1] = 0
    return made


@_tile("second", touches="row")
def first_row_of_an_expert_lost(site: Site, rows: Tensor, w2: Weights, group: Group, choice: KernelChoice) -> Tensor:
    """The first row of the first expert is zero."""
    made = site.right(rows, w2, group, choice)
    made[0, 0] = 0
    return made


@_tile("second", touches="row")
def row_32_of_an_expert_lost(site: Site, rows: Tensor, w2: Weights, group: Group, choice: KernelChoice) -> Tensor:
    """The first row of the first expert's second tile is zero."""
    made = site.right(rows, w2, group, choice)
    made[0, _TILE : _TILE + 1] = 0
    return made


@_tile("second", touches="row")
def row_31_doubled(site: Site, rows: Tensor, w2: Weights, group: Group, choice: KernelChoice) -> Tensor:
    """The last row of the second expert's first tile is doubled."""
    made = site.right(rows, w2, group, choice)
    made[min(1, len(made) - 1), _TILE - 1 : _TILE] *= 2
    return made


@_tile("second", touches="elements")
def one_element_of_a_corner_lost(site: Site, rows: Tensor, w2: Weights, group: Group, choice: KernelChoice) -> Tensor:
    """The last column of each expert's row 15 is zero."""
    made = site.right(rows, w2, group, choice)
    made[:, 15:16, -1] = 0
    return made


@_tile("second", touches="elements")
def corner_of_16_by_4_lost(site: Site, rows: Tensor, w2: Weights, group: Group, choice: KernelChoice) -> Tensor:
    """Columns 60 to 63 of each expert's first 16 rows are zero."""
    made = site.right(rows, w2, group, choice)
    made[:, :16, 60:64] = 0
    return made


@_tile(
    "second",
    equivalent="rows past an expert's last one belong to no route and are dropped",
)
def padded_rows_are_garbage(site: Site, rows: Tensor, w2: Weights, group: Group, choice: KernelChoice) -> Tensor:
    """Rows of a tile past the expert's last one hold garbage."""
    made = site.right(rows, w2, group, choice)
    made[group.routes >= group.total] = -1e30
    return made


@_tail("computed", touches="row")
def last_row_lost(site: Site, given: ExpertInput, rows: Tensor) -> Tensor:
    """The last live row is zero."""
    rows[max(live(given) - 1, 0) : live(given)] = 0
    return rows


@_tail("computed", touches="row")
def last_row_doubled(site: Site, given: ExpertInput, rows: Tensor) -> Tensor:
    """The last live row is doubled."""
    rows[max(live(given) - 1, 0) : live(given)] *= 2
    return rows


@_tail("computed", touches="row")
def first_row_lost(site: Site, given: ExpertInput, rows: Tensor) -> Tensor:
    """The first row is zero, as if a padded entry of the sort pointed to it and stored last."""
    rows[: min(live(given), 1)] = 0
    return rows


@_tail("computed", touches="row", bug="aiter 3677: padded tokens of the sort bring NaN into rows")
def first_row_nan(site: Site, given: ExpertInput, rows: Tensor) -> Tensor:
    """The first row is NaN."""
    rows[: min(live(given), 1)] = float("nan")
    return rows


@_tail("computed")
def part_tile_of_32_lost(site: Site, given: ExpertInput, rows: Tensor) -> Tensor:
    """Rows past the last whole 32, or the last 32, are zero."""
    rows[(live(given) - 1) // 32 * 32 : live(given)] = 0
    return rows


@_tail("computed")
def part_tile_of_16_lost(site: Site, given: ExpertInput, rows: Tensor) -> Tensor:
    """Rows past the last whole 16, or the last 16, are zero."""
    rows[(live(given) - 1) // 16 * 16 : live(given)] = 0
    return rows


@_tail("computed")
def part_tile_repeats_a_row(site: Site, given: ExpertInput, rows: Tensor) -> Tensor:
    """Rows past the last whole 32 all repeat the row before them: a clamped index."""
    start = (live(given) - 1) // 32 * 32
    rows[start : live(given)] = rows[max(start - 1, 0)].clone()
    return rows


@_tail("computed")
def part_tile_reversed(site: Site, given: ExpertInput, rows: Tensor) -> Tensor:
    """Rows past the last whole 32, or the last 32, are in reverse order."""
    start = (live(given) - 1) // 32 * 32
    rows[start : live(given)] = rows[start : live(given)].flip(0)
    return rows


@_tail("second")
def last_route_of_each_expert_lost(site: Site, rows: Tensor, w2: Weights, group: Group, choice: KernelChoice) -> Tensor:
    """The last row of each expert is zero."""
    made = site.right(rows, w2, group, choice)
    made[torch.arange(len(made)), _last_of_each(group)] = 0
    return made


@_tail("second", touches="row")
def last_route_of_one_expert_lost(site: Site, rows: Tensor, w2: Weights, group: Group, choice: KernelChoice) -> Tensor:
    """The last row of the last expert is zero."""
    made = site.right(rows, w2, group, choice)
    made[-1, _last_of_each(group)[-1]] = 0
    return made


@_tail("asked", touches="row")
def live_count_one_short(site: Site, given: ExpertInput) -> ExpertInput:
    """The kernel reads num_local_tokens as one less."""
    return given._replace(num_local_tokens=(given.num_local_tokens - 1).clamp(min=0))


@_tail("computed", touches="elements")
def end_of_the_last_row_lost(site: Site, given: ExpertInput, rows: Tensor) -> Tensor:
    """The last 4 columns of the last live row are zero."""
    rows[max(live(given) - 1, 0) : live(given), -4:] = 0
    return rows


@_tail("computed", touches="elements")
def last_column_of_the_part_tile_lost(site: Site, given: ExpertInput, rows: Tensor) -> Tensor:
    """The last column is zero past the last whole 32 rows."""
    rows[(live(given) - 1) // 32 * 32 : live(given), -1] = 0
    return rows


@_tail(
    "computed",
    bug="rtp-llm 1325: executors that ignore the live-row count compute padding as real tokens",
    equivalent="combine reads no row past the received ones, so garbage there reaches no token",
)
def rows_past_the_live_ones_written(site: Site, given: ExpertInput, rows: Tensor) -> Tensor:
    """Rows past the live ones are written too."""
    rows[live(given) :] = 1.0
    return rows


@_order("computed")
def neighbours_swapped(site: Site, given: ExpertInput, rows: Tensor) -> Tensor:
    """Rows are exchanged in pairs."""
    count = live(given) // 2 * 2
    rows[:count] = rows[:count].unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    return rows


@_order("computed")
def rows_reversed(site: Site, given: ExpertInput, rows: Tensor) -> Tensor:
    """Rows are in reverse order."""
    rows[: live(given)] = rows[: live(given)].flip(0)
    return rows


@_order("computed")
def rows_rolled(site: Site, given: ExpertInput, rows: Tensor) -> Tensor:
    """Each row is one place after its own."""
    rows[: live(given)] = rows[: live(given)].roll(1, 0)
    return rows


@_order("weigh")
def routes_rolled_within_experts(site: Site, rows: Tensor, weights: Tensor, group: Group) -> Tensor:
    """An expert's rows go to the routes one place later: the sort was not stable."""
    made = site.right(rows, weights, group)
    return made.roll(1, 1)


@_order("round")
def slots_before_tokens(site: Site, routes: Tensor) -> Tensor:
    """Routes are laid out by slot and token, and read by token and slot."""
    made = site.right(routes)
    return made.transpose(0, 1).reshape(made.shape)


@_order("asked")
def hidden_of_the_next_row(site: Site, given: ExpertInput) -> ExpertInput:
    """Rows are gathered one place later; ids and weights are right."""
    hidden = given.hidden.clone()
    bytes_of = hidden.view(torch.uint8)
    bytes_of[: live(given)] = bytes_of[: live(given)].roll(-1, 0)
    return given._replace(hidden=hidden)


@_order("returned")
def returned_rows_rolled(site: Site, rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Combine reads each row as its neighbour's."""
    return rows.roll(1, 0), ids


@_order("combined")
def tokens_swapped(site: Site, tokens: Tensor) -> Tensor:
    """Tokens are exchanged in pairs."""
    count = len(tokens) // 2 * 2
    tokens[:count] = tokens[:count].unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    return tokens


@_order("received")
def whole_rows_swapped(site: Site, dispatched: Dispatched) -> Dispatched:
    """Received rows are exchanged in pairs with ids and weights, but not in the map back to their tokens."""
    count = int(dispatched.total_recv) // 2 * 2
    for part in dispatched.fields():
        whole = part.view(torch.uint8)[:count]
        whole.copy_(whole.unflatten(0, (-1, 2)).flip(1).flatten(0, 1))
    return dispatched


@_order("computed", touches="row")
def one_row_is_its_neighbour(site: Site, given: ExpertInput, rows: Tensor) -> Tensor:
    """One row in 64 is the row before it."""
    wrong = rare(live(given))
    rows[wrong] = rows[(wrong - 1).clamp(min=0)]
    return rows


@_order("asked", touches="row")
def hidden_of_one_row_is_its_neighbours(site: Site, given: ExpertInput) -> ExpertInput:
    """One row in 64 is gathered from the row before it; ids and weights are right."""
    hidden = given.hidden.clone()
    wrong = rare(live(given))
    hidden.view(torch.uint8)[wrong] = hidden.view(torch.uint8)[(wrong - 1).clamp(min=0)]
    return given._replace(hidden=hidden)


@_order("computed", touches="row")
def two_rows_swapped(site: Site, given: ExpertInput, rows: Tensor) -> Tensor:
    """The first row and the last one are exchanged."""
    ends = [0, max(live(given) - 1, 0)]
    rows[ends] = rows[ends[::-1]]
    return rows


@_order("combined", touches="row")
def one_token_is_its_neighbour(site: Site, tokens: Tensor) -> Tensor:
    """One token in 64 has the result of the token before it."""
    wrong = rare(len(tokens))
    tokens[wrong] = tokens[(wrong - 1).clamp(min=0)]
    return tokens


@_order("combined", touches="elements")
def a_vector_of_one_token_is_its_neighbours(site: Site, tokens: Tensor) -> Tensor:
    """Eight columns of one token in 64 are those of the token before it."""
    wrong = rare(len(tokens))
    tokens[wrong, 8:16] = tokens[(wrong - 1).clamp(min=0), 8:16]
    return tokens


@_order("add", equivalent="an atomic kernel adds routes in any order, and a kernel that reduces keeps float32 sums")
def routes_added_in_reverse(site: Site, routes: Tensor, sums: torch.dtype) -> Tensor:
    """Routes are added from the last slot to the first."""
    return site.right(routes.flip(1), sums)
