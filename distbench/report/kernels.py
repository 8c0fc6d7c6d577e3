"""Kernel labels for two kernels side by side."""

from __future__ import annotations

from typing import Any

OTHER_CODE = "*"


def label_beside(kernel: dict[str, Any], padded: dict[str, Any]) -> str:
    """Label of a kernel, marked where the padded kernel has the same label but other code."""
    other = any(kernel[stage] != padded[stage] for stage in ("stage1", "stage2"))
    label: str = kernel["label"]
    return label + OTHER_CODE * (other and label == padded["label"])
