from __future__ import annotations

import pytest

from distbench.report.rank_table import label_beside

PADDED = {"label": "T bm128", "stage1": "a", "stage2": "b"}


@pytest.mark.parametrize(
    ("kernel", "label"),
    [
        (PADDED, "T bm128"),
        (PADDED | {"stage2": "c"}, "T bm128*"),
        (PADDED | {"stage1": "c"}, "T bm128*"),
        ({"label": "T bm64", "stage1": "c", "stage2": "b"}, "T bm64"),
    ],
)
def test_kernel_that_differs_from_the_padded_one_by_name_only_is_marked(kernel: dict[str, str], label: str) -> None:
    assert label_beside(kernel, PADDED) == label
