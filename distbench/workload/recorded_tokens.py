"""Recorded hidden states as tokens of a case with gaussian inputs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from distbench.workload.routing import recorded_places
from distbench.workload.routing_spec import Routing, recorded_tensors
from distbench.workload.trace_tensors import BF16


def recorded_hidden(routing: Routing, keys: Tensor, hidden_size: int) -> tuple[Tensor, Tensor | None] | None:
    """Return the recorded hidden states of the tokens with keys int64 [m]; None where none were recorded.

    They are bf16 [m, H], padded with zeros to `hidden_size` columns, or fp8 [m, H] and scales float32 [m, H / 128].
    """
    tensors = None if routing.trace is None else recorded_tensors(routing.trace)
    if routing.trace is None or tensors is None:
        return None
    places = recorded_places(routing.trace, keys).cpu().numpy()
    bits = torch.from_numpy(tensors.parts[0][places])
    if tensors.kind == BF16:
        hidden = bits.view(torch.bfloat16).to(keys.device)
        return pad(hidden, (0, hidden_size - hidden.shape[1])), None
    hidden = bits.view(getattr(torch, f"float8_{tensors.kind}")).to(keys.device)
    return hidden, torch.from_numpy(tensors.scales[0][places]).to(keys.device)
