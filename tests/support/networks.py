"""Networks that answer something without having been trained."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


def fill_zeros(network: Network) -> Network:
    """Random weights wherever a fresh network has zeros: it changes what it is put on, as a trained one does."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return network
