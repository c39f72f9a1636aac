"""A CUDA device that is none: real numbers on the processor, with the rules of two devices.

Inside of `PretendCuda` every tensor has a place. ``.to("cuda")`` moves it there, networks may be moved there, and what
follows from tensors on the device lies on the device. What torch refuses on a real one is refused here too: tensors of
both places in one operation, NumPy on the device, an index on the device into the processor's memory, a generator of
the processor for numbers on the device. What makes the processor wait for the device is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, resolve_name

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")

_MARK = "_pretended_place"

_WAITS = {"item", "tolist", "__bool__", "__float__", "__int__", "__index__", "cpu", "nonzero", "unique", "equal"}
"""Calls that need a value, or a number of values, on the processor."""

_MOVES = {"copy_", "set_"}
"""Calls between two places."""

_LOOKS_UP = {"__getitem__", "__setitem__", "index_put_", "index_put", "take_along_dim"}


class PretendCuda(TorchFunctionMode):
    """Within the ``with`` block.

    Attributes:
        waits: How often which call made the processor wait.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def move(self, module: nn.Module) -> nn.Module:
        """Have a network's weights lie on the device."""
        for tensor in (*module.parameters(), *module.buffers()):
            mark(tensor, CUDA)
        return module

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", str(func))
        if name == "__get__":
            return self._look(func, args[0])
        if name in ("to", "cuda", "cpu", "pin_memory") and args and isinstance(args[0], torch.Tensor):
            return self._move(name, func, args, kwargs)
        if name in ("numpy", "__array__") and place(args[0]) == CUDA:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        tensors = list(_find_tensors((args, kwargs)))
        where = self._decide(func, name, tensors, args, kwargs)
        if name in _WAITS and where == CUDA:
            self.waits[name] += 1
        result = func(*args, **kwargs)
        for tensor in _find_tensors(result):
            if name not in _MOVES:
                mark(tensor, where)
        return result

    def _look(self, func: Any, tensor: Any) -> Any:
        """An attribute of a tensor."""
        attribute = resolve_name(func) or ""
        if attribute.endswith("Tensor.device.__get__"):
            return place(tensor)
        if attribute.endswith("Tensor.is_cuda.__get__"):
            return place(tensor) == CUDA
        found = func(tensor)
        if isinstance(found, torch.Tensor):
            mark(found, place(tensor))
        return found

    def _move(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        tensor, rest = args[0], list(args[1:])
        target = {"cuda": CUDA, "cpu": CPU}.get(name, place(tensor))
        if name == "to":
            asked = kwargs.pop("device", None)
            if asked is None and rest and isinstance(rest[0], str | torch.device):
                asked = rest.pop(0)
            elif rest and isinstance(rest[0], torch.Tensor):
                asked = place(rest[0])
            if asked is not None:
                target = CUDA if torch.device(asked).type == "cuda" else CPU
        if place(tensor) == CUDA and target == CPU and not kwargs.get("non_blocking"):
            self.waits["cpu"] += 1
        has_more = rest or kwargs
        result = func(tensor, *rest, **kwargs) if name == "to" and has_more else tensor
        if result is tensor and target != place(tensor):
            result = tensor.view_as(tensor)
        mark(result, target)
        return result

    def _decide(self, func: Any, name: str, tensors: list[Any], args: Any, kwargs: dict[str, Any]) -> torch.device:
        """Where the result of a call lies."""
        asked = kwargs.get("device")
        if asked is not None:
            kwargs["device"] = CPU
            where = CUDA if torch.device(asked).type == "cuda" else CPU
        else:
            where = CUDA if any(place(tensor) == CUDA for tensor in tensors) else CPU
        generator = kwargs.get("generator")
        if where == CUDA and generator is not None and generator.device.type == "cpu":
            raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu' ({name})")
        if name in _MOVES or asked is not None:
            return place(args[0]) if name in _MOVES else where
        if name in _LOOKS_UP:
            on_device = [t for t in _find_tensors(args[1]) if place(t) == CUDA]
            if place(args[0]) == CPU and any(t.dim() for t in on_device):
                raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
            # A single number is an index that the processor asks for; where a mask holds so many too.
            self.waits["index"] += sum(t.dim() == 0 or t.dtype == torch.bool for t in on_device)
            return place(args[0])
        if where == CUDA:
            strange = [tensor for tensor in tensors if place(tensor) == CPU and tensor.dim()]
            if strange:
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                    f"({resolve_name(func) or name}, {[tuple(t.shape) for t in strange]})"
                )
        return where


def place(tensor: torch.Tensor) -> torch.device:
    """Where a tensor pretends to lie."""
    return tensor.__dict__.get(_MARK, CPU) if hasattr(tensor, "__dict__") else CPU


def mark(tensor: torch.Tensor, where: torch.device) -> None:
    """Have a tensor pretend to lie somewhere."""
    tensor.__dict__[_MARK] = where


def _find_tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _find_tensors(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _find_tensors(each)
