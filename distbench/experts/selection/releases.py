"""Release-dependent parts of aiter's kernel choice: the buckets of row counts, the lookup and the heuristics.

Each entry of `BUCKET_RULES` was read from the sources at the release tag that it is named after
(docs/kernel-selection.md lists the changes).
"""

from __future__ import annotations

import msgspec
from packaging.version import Version

from distbench.errors import InvalidCase
from distbench.utils.versions import release_of


class BucketRules(msgspec.Struct, frozen=True, kw_only=True):
    """The rules of one generation of aiter releases. Units: rows, or elements for dimensions."""

    floor: int
    """1 to `floor` rows share one bucket."""
    tiers: tuple[int, ...]
    """From the first tier up, the bucket is the largest tier not above the rows; below it, the next power of two."""
    tier_fallback: bool
    """A tier above the first without a tuned row uses the row of a lower tier."""
    activation_matters: bool
    """A tuned row applies only to its own activation; later releases compare without it."""
    ep_drops_topk: bool
    """With an expert_mask, one of the top-k columns counts as a masked filler and is subtracted."""
    fp8_one_stage_over: int | None
    """Buckets above this run per_1x128 in one stage where inter_dim allows; None: never."""
    fp8_one_stage_inter: int
    """inter_dim must be a multiple of this for one stage."""
    fp8_small_tile: bool
    """Two-stage per_1x128 uses 16-row tiles up to bucket 32; otherwise always 64-row tiles."""
    fp8_split_columns: int
    """Multiples of inter_dim that get_ksplit counts as columns; 0: no split-k without a tuned row."""
    fp8_asm_stage1: bool
    """Stage 1 of two-stage per_1x128 is assembly rather than CK, unless it applies routing weights."""
    gelu_one_stage: bool
    """gfx950 has a one-stage kernel of per_1x128 for Gelu too."""
    fp8_fitted_stage2: bool
    """CK's 16-row stage 2 halves its tile where inter_dim does not fill the full one."""
    bf16_narrow_tiles: bool
    """CK has special tiles for a small inter_dim."""
    reads_overrides: bool
    """AITER_KSPLIT and AITER_BYPASS_TUNE_CONFIG are read."""
    unsplit_tuned: bool
    """AITER_KSPLIT=-1 also removes the split of tuned rows."""


_FIRST = BucketRules(
    floor=16,
    tiers=(1024,),
    tier_fallback=False,
    activation_matters=True,
    ep_drops_topk=False,
    fp8_one_stage_over=0,
    fp8_one_stage_inter=256,
    fp8_small_tile=False,
    fp8_split_columns=0,
    fp8_asm_stage1=True,
    gelu_one_stage=False,
    fp8_fitted_stage2=False,
    bf16_narrow_tiles=False,
    reads_overrides=False,
    unsplit_tuned=False,
)


def _generations() -> dict[str, BucketRules]:
    changed = msgspec.structs.replace
    rules = {"0.1.5": _FIRST}
    rules["0.1.8"] = changed(_FIRST, tiers=(1024, 2048, 16384), bf16_narrow_tiles=True)
    rules["0.1.9"] = changed(
        rules["0.1.8"],
        floor=1,
        fp8_one_stage_over=32,
        fp8_small_tile=True,
        fp8_split_columns=2,
        fp8_asm_stage1=False,
        reads_overrides=True,
    )
    rules["0.1.9.post1"] = changed(rules["0.1.9"], fp8_split_columns=1)
    rules["0.1.10"] = changed(rules["0.1.9.post1"], fp8_one_stage_over=None, fp8_fitted_stage2=True)
    rules["0.1.10.post1"] = changed(rules["0.1.10"], fp8_one_stage_over=32)
    rules["0.1.12"] = changed(rules["0.1.10.post1"], tiers=(32768,), fp8_one_stage_inter=128, gelu_one_stage=True)
    rules["0.1.13"] = changed(rules["0.1.12"], unsplit_tuned=True)
    rules["0.1.14"] = changed(rules["0.1.13"], tiers=(32768, 131072), tier_fallback=True, activation_matters=False)
    rules["0.1.16"] = changed(rules["0.1.14"], ep_drops_topk=True)
    return rules


BUCKET_RULES = _generations()
"""The rules, by the first release that has them, oldest first."""

CURRENT = BUCKET_RULES["0.1.16"]


def rules_for(version: str) -> BucketRules:
    """Return the rules of an aiter version such as `0.1.7.post2.dev18` or `v0.1.20`; for "" the newest.

    Versions are ordered by PEP 440, so a development version falls under the release before the one it leads to.

    Raises:
        InvalidCase: not a version, or older than every known generation.
    """
    if not version:
        return CURRENT
    wanted = _release(version)
    known = [name for name in BUCKET_RULES if _release(name) <= wanted]
    if not known:
        message = (
            f"aiter version {version!r}: no rules are known before {next(iter(BUCKET_RULES))}; for a build without git "
            "tags, set aiter_version to the release it was built from"
        )
        raise InvalidCase(message)
    return BUCKET_RULES[known[-1]]


def padded_rows(rows: int, rules: BucketRules = CURRENT) -> int:
    """Return the bucket of a row count, by which aiter selects (v0.1.20, get_padded_M)."""
    if rows >= rules.tiers[0]:
        return max(tier for tier in rules.tiers if tier <= rows)
    if rows <= 0:
        return 1
    return max(rules.floor, 1 << (rows - 1).bit_length())


def _release(version: str) -> Version:
    key = release_of(version)
    if key is None:
        message = f"aiter version {version!r:.80}: not a release such as 0.1.7.post2.dev18 or 0.1.20; set aiter_version"
        raise InvalidCase(message)
    return key
