"""What a stage hands to the loop: how to draw a micro-batch, and the loss of one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Figures = Mapping[str, float | Tensor]
"""Numbers to log; those that the device computes stay there as scalars until somebody looks at them."""

ComputeLoss = Callable[[int, torch.Generator], tuple[Tensor, Figures]]
"""(step, generator) -> loss and figures."""


class Objective(ABC):
    """A loss in two parts, so that the first can be done ahead by a thread while the device computes the second."""

    @abstractmethod
    def draw(self, generator: torch.Generator) -> Any:
        """A micro-batch on the CPU: tensors, or dataclasses, tuples and lists of them.

        All randomness comes from the generator, and nothing is read that `compute` changes.
        """

    @abstractmethod
    def compute(self, drawn: Any, step: int, generator: torch.Generator) -> tuple[Tensor, Figures]:
        """Loss and figures of a micro-batch.

        Args:
            drawn: From `draw`, in pinned memory where there is CUDA; `move` takes it to the device.
            step: Of the optimizer.
            generator: Goes on where drawing stopped. What is computed may also use torch's global state.
        """

    def __call__(self, step: int, generator: torch.Generator) -> tuple[Tensor, Figures]:
        """Both parts, one after the other."""
        return self.compute(self.draw(generator), step, generator)


class DrawnWithin(Objective):
    """An objective that is a plain function and draws for itself."""

    def __init__(self, compute_loss: ComputeLoss) -> None:
        self._compute_loss = compute_loss

    def draw(self, generator: torch.Generator) -> None:
        """Nothing."""

    def compute(self, drawn: None, step: int, generator: torch.Generator) -> tuple[Tensor, Figures]:
        """What the function says."""
        return self._compute_loss(step, generator)
