"""What a PyTorch state dict says of its tensors, unpickled without running anything of it.

A pickle is a program: its GLOBAL opcode fetches any function and REDUCE calls it. Here it can fetch three kinds of
name (`OrderedDict`, `_rebuild_tensor_v2`, the storage types), each of which stands for an inert object of ours.
https://docs.python.org/3/library/pickle.html#restricting-globals
"""

from __future__ import annotations

import io
import pickle
import pickletools
from dataclasses import dataclass
from typing import Any

STORAGES = {
    "FloatStorage": ("f32", 4), "HalfStorage": ("f16", 2), "BFloat16Storage": ("bf16", 2), "DoubleStorage": ("F64", 8),
    "LongStorage": ("I64", 8), "IntStorage": ("I32", 4), "ShortStorage": ("I16", 2), "CharStorage": ("I8", 1),
    "ByteStorage": ("U8", 1), "BoolStorage": ("BOOL", 1),
}  # fmt: skip
"""Storage class of `torch` -> what a `TensorInfo` calls its type, and bytes per value."""


@dataclass(frozen=True)
class Storage:
    """A run of values in the archive's entry `data/KEY`."""

    dtype: str
    itemsize: int
    key: str
    count: int


@dataclass(frozen=True)
class View:
    """A tensor: a strided view of a storage; `offset` and `stride` in values."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def read_state_dict(data: bytes) -> dict[str, View]:
    """Names and views of a pickled state dict (torch's `data.pkl`, protocols 2 to 5).

    Raises:
        ValueError: it names something that would run code, or is no state dict, or damaged; says which.
    """
    try:
        for opcode, argument, _ in pickletools.genops(data):
            # the memo is an array: a number far beyond what so short a pickle can fill would allocate gigabytes
            if opcode.name in ("BINPUT", "LONG_BINPUT", "PUT") and int(argument or 0) > len(data):
                raise ValueError("its pickle is damaged")
        content = _Unpickler(io.BytesIO(data)).load()
    except _RefusedError as e:
        raise ValueError(str(e)) from e
    except Exception as e:  # a damaged pickle may raise anything
        raise ValueError(f"its pickle is damaged ({type(e).__name__})") from e
    if not isinstance(content, dict) or not content:
        raise ValueError("it holds no dict of tensors by name")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, View):
            raise ValueError(f"its entry {str(name)[:80]!r} is no tensor: a plain state dict was expected")
    return content


class _RefusedError(Exception):
    """The pickle asks for what it may not have."""


class _StateDict(dict[Any, Any]):
    """In place of OrderedDict; what is set on it (torch's `_metadata`) is dropped."""

    def __setstate__(self, state: object) -> None:
        pass


class _Rebuild:
    """In place of `torch._utils._rebuild_tensor_v2`."""

    __slots__ = ()

    def __call__(self, storage: object, offset: object, shape: object, stride: object, *rest: object) -> View:
        """The view those arguments describe; the rest (gradients, hooks) does not concern us."""
        if not isinstance(storage, Storage) or not all(_counts(v) for v in ((offset,), shape, stride)):
            raise _RefusedError("a tensor's description is not sound")
        return View(storage, offset, shape, stride)  # type: ignore[arg-type]

    def __setstate__(self, state: object) -> None:
        pass


class _StorageType(str):
    """In place of a storage class: its name."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """One of ours, or refuse."""
        if (module, name) == ("collections", "OrderedDict"):
            return _StateDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Rebuild()
        if module == "torch" and name in STORAGES:
            return _StorageType(name)
        raise _RefusedError(f"its pickle names {f'{module}.{name}'[:120]!r}, no tensor or dict: it would run code")

    def persistent_load(self, pid: object) -> Storage:
        """A storage: ('storage', its type, key in the archive, location, number of values)."""
        match pid:
            case ("storage", _StorageType() as kind, str(key), str(), int(count)) if count >= 0:
                return Storage(*STORAGES[kind], key, count)
        raise _RefusedError("a storage's description is not sound")


def _counts(value: object) -> bool:
    return isinstance(value, tuple) and all(type(v) is int and 0 <= v < 2**62 for v in value)
