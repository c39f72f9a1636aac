"""What a decoding child sends back: JSON, and arrays as bytes in a file; never pickle, and nothing is believed.

The parent knows by its annotations what a function returns, and takes nothing else: numbers, text, arrays of numbers,
tuples, lists, dictionaries, and dataclasses made of these.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Union, get_args, get_origin

import numpy as np
from numpy.typing import NDArray

_ALIGNMENT = 64
_WORTH_A_BOX = 1 << 20
_TYPES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")

Write = Callable[[bytes | memoryview], object]


class WireError(ValueError):
    """What came back is not what was to come back."""


class Packer:
    """Turns a result into JSON, and writes its arrays one after the other.

    Args:
        write: Takes all bytes that it is given.
    """

    def __init__(self, write: Write) -> None:
        self._write = write
        self._place = 0

    def pack(self, value: Any) -> Any:
        """JSON of a result.

        Raises:
            WireError: if it holds what cannot be sent.
        """
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, np.ndarray):
            return self._pack_array(value)
        if dataclasses.is_dataclass(value):
            return {field.name: self.pack(getattr(value, field.name)) for field in dataclasses.fields(value)}
        if isinstance(value, Mapping):
            return {str(key): self.pack(entry) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [self.pack(entry) for entry in value]
        raise WireError(f"a {type(value).__name__} cannot be sent")

    def _pack_array(self, array: NDArray[Any]) -> dict[str, Any]:
        if array.dtype.str[1:] not in _TYPES:
            raise WireError(f"an array of {array.dtype} cannot be sent")
        # Voxels come in the order of the file, fastest first: neither order is copied.
        is_fortran = array.flags.f_contiguous and not array.flags.c_contiguous
        plain = array.T if is_fortran else np.ascontiguousarray(array)
        plain = plain.astype(plain.dtype.newbyteorder("="), copy=False)
        box = _find_box(plain)
        if box is not None:  # Of a label most is background, and what is sent costs time.
            part = self.pack(np.ascontiguousarray(plain[tuple(slice(low, high) for low, high in box)]))
            return {"part": part, "box": [list(side) for side in box], "shape": list(plain.shape), "turned": is_fortran}
        gap = -self._place % _ALIGNMENT
        self._write(bytes(gap))
        place = self._place + gap
        if plain.nbytes:
            self._write(plain.reshape(-1).view(np.uint8).data)
        self._place = place + plain.nbytes
        return {
            "dtype": plain.dtype.str[1:],
            "shape": list(array.shape),
            "order": "F" if is_fortran else "C",
            "at": place,
        }


class Unpacker:
    """The way back.

    Args:
        content: The arrays' bytes. Arrays are views of it.
        most: Bytes that an array may have of which only a part was sent.
    """

    def __init__(self, content: Any, most: int = 8 << 30) -> None:
        self._content = memoryview(content)
        self._most = most

    def unpack(self, tree: Any, kind: Any) -> Any:
        """A result of a kind that annotations give.

        Raises:
            WireError: if it is of another kind.
        """
        origin = get_origin(kind)
        if origin in (Union, types.UnionType):
            return self._unpack_any_of(tree, get_args(kind))
        if origin is np.ndarray or kind is np.ndarray:
            return self._unpack_array(tree, kind)
        if origin in (tuple, list):
            return self._unpack_sequence(tree, origin, get_args(kind))
        if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
            _check(isinstance(tree, dict), "a dictionary")
            key, entry = get_args(kind)
            return {self._unpack_key(name, key): self.unpack(value, entry) for name, value in tree.items()}
        if dataclasses.is_dataclass(kind):
            return self._unpack_fields(tree, kind)
        if kind is Any:  # Only ever met inside `Mapping[str, Any]` of arrays.
            return self._unpack_array(tree, np.ndarray) if isinstance(tree, dict) else tree
        if kind is type(None) or kind is None:
            _check(tree is None, "nothing")
        elif kind is float:
            _check(isinstance(tree, int | float) and not isinstance(tree, bool), "a number")
        else:
            _check(kind in (bool, int, str) and type(tree) is kind, getattr(kind, "__name__", str(kind)))
        return tree

    def _unpack_any_of(self, tree: Any, kinds: tuple[Any, ...]) -> Any:
        for kind in kinds:
            try:
                return self.unpack(tree, kind)
            except WireError:
                continue
        raise WireError("it is of none of the kinds that are allowed")

    def _unpack_sequence(self, tree: Any, origin: Any, kinds: tuple[Any, ...]) -> Any:
        _check(isinstance(tree, list), "a list")
        if origin is list or (len(kinds) == 2 and kinds[1] is Ellipsis):
            return origin(self.unpack(entry, kinds[0]) for entry in tree)
        _check(len(tree) == len(kinds), f"{len(kinds)} entries")
        return tuple(self.unpack(entry, kind) for entry, kind in zip(tree, kinds, strict=True))

    def _unpack_key(self, name: str, kind: Any) -> Any:
        if kind is int:
            _check(name.lstrip("-").isdecimal() and len(name) < 20, "a whole number")
            return int(name)
        return self.unpack(name, kind)

    def _unpack_fields(self, tree: Any, kind: Any) -> Any:
        _check(isinstance(tree, dict), f"a {kind.__name__}")
        hints = typing.get_type_hints(kind)
        names = {field.name for field in dataclasses.fields(kind)}
        _check(set(tree) == names, f"the fields of a {kind.__name__}")
        return kind(**{name: self.unpack(tree[name], hints[name]) for name in names})

    def _unpack_array(self, tree: Any, kind: Any) -> NDArray[Any]:
        if isinstance(tree, dict) and set(tree) == {"part", "box", "shape", "turned"}:
            return self._unpack_box(tree, kind)
        _check(isinstance(tree, dict) and set(tree) == {"dtype", "shape", "order", "at"}, "an array")
        name, shape, order, place = tree["dtype"], tree["shape"], tree["order"], tree["at"]
        _check(isinstance(name, str) and name in _TYPES, "a type of numbers")
        shape = _read_shape(shape)
        dtype = np.dtype(name)
        wanted = get_args(get_args(kind)[1]) if get_args(kind) else ()
        if wanted and isinstance(wanted[0], type) and issubclass(wanted[0], np.generic):
            _check(np.issubdtype(dtype, wanted[0]), f"an array of {wanted[0].__name__}")
        count = math.prod(shape)
        _check(type(place) is int and place >= 0 and place + count * dtype.itemsize <= len(self._content), "inside")
        if not count:
            return np.zeros(shape, dtype)
        array = np.frombuffer(self._content, dtype, count, place)
        return array.reshape(shape, order="F" if order == "F" else "C")

    def _unpack_box(self, tree: dict[str, Any], kind: Any) -> NDArray[Any]:
        shape, box, part = _read_shape(tree["shape"]), tree["box"], tree["part"]
        _check(isinstance(part, dict) and "part" not in part, "an array")
        inner = self._unpack_array(part, kind)
        _check(isinstance(box, list) and len(box) == len(shape) == inner.ndim, "a box")
        sides = []
        for side, size, length in zip(box, shape, inner.shape, strict=True):
            _check(isinstance(side, list) and len(side) == 2 and all(type(place) is int for place in side), "a box")
            low, high = side
            _check(0 <= low <= high <= size and high - low == length, "a box")
            sides.append(slice(low, high))
        _check(math.prod(shape) * inner.itemsize <= self._most, "an array that fits")
        array = np.zeros(shape, inner.dtype)
        array[tuple(sides)] = inner
        return array.T if tree["turned"] is True else array


def _read_shape(shape: Any) -> list[int]:
    _check(isinstance(shape, list) and len(shape) <= 8, "a shape")
    _check(all(type(size) is int and 0 <= size < 1 << 40 for size in shape), "a shape")
    return list(shape)


def _find_box(array: NDArray[Any]) -> list[tuple[int, int]] | None:
    """Where a large array of unsigned numbers is not zero, per axis, half-open; None if that is no small part of it."""
    if array.dtype.kind != "u" or array.ndim != 3 or array.nbytes < _WORTH_A_BOX:
        return None
    box: list[tuple[int, int]] = []
    part = array
    for axis in range(3):
        found = np.flatnonzero(part.max(axis=tuple(other for other in range(3) if other != axis)))
        low, high = (int(found[0]), int(found[-1]) + 1) if len(found) else (0, 0)
        box.append((low, high))
        part = part[(slice(None),) * axis + (slice(low, high),)]
        if not part.size:
            return [*box, *((0, 0) for _ in range(2 - axis))]
    return box if part.size < array.size // 2 else None


def _check(holds: bool, wanted: str) -> None:
    if not holds:
        raise WireError(f"it is not {wanted}")
