"""Finds out in a few microseconds whether thousands of dicts, types and tensors have changed.

CPython records changes of dicts. Up to 3.11 each dict has a version tag, which every change replaces. From 3.12 on,
CPython can call a function, a dict watcher, at each change of a watched dict; ours counts the changes. A dict's
version, this count, and an object's pointer to its type are each one word: 8 bytes in memory. Compiled code compares
the words, and the dtype, device, layout, shape and strides of tensors, with remembered values. `usable` first tests
whether this works in the running Python.
"""

import ctypes
import functools
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Collection
from typing import Any

import torch

from convmixer.kernels.cpu import build

TYPE, VERSION = 8, 24  # offsets in bytes: of an object's type, and of a dict's version tag up to 3.11
_HAS_WATCHERS = sys.version_info >= (3, 12)


class Unchanged:
    """Remembers the state of dicts, objects and tensors. Use it only if `usable` returns True.

    The caller must keep the dicts, objects and tensors alive.

    Args:
        dicts: A change is a key that is set, added or removed.
        objects: A change is another `__class__`.
        tensors: A change is a different dtype, device, layout, shape or stride; different values are not a change.
    """

    def __init__(
        self, dicts: Collection[dict[Any, Any]], objects: Collection[Any], tensors: Collection[torch.Tensor]
    ) -> None:
        words = [*_words(dicts), *(id(one) + TYPE for one in objects)]
        places = [id(tensor) + _tensor_offset() for tensor in tensors]
        self._words, self._places = (ctypes.c_void_p * len(words))(*words), (ctypes.c_void_p * len(places))(*places)
        self._same = _library().convmixer_same
        self.remember(self.state())

    def state(self) -> Any:
        """Return the current state."""
        library, words, places = _library(), len(self._words), len(self._places)
        values, facts = (ctypes.c_uint64 * words)(), (ctypes.c_char * (places * library.convmixer_facts_bytes()))()
        library.convmixer_remember(*self._args_with(values, facts))
        return values, facts

    def remember(self, state: Any) -> None:
        """Store a result of `state` for `holds` to compare with."""
        self._compared = state, self._args_with(*state)  # in one step: threads see both old or both new

    def holds(self) -> bool:
        """Return whether nothing has changed since the remembered state.

        From Python 3.12 on, a change of any watched dict counts, even if only another `Unchanged` watches it.
        """
        return bool(self._same(*self._compared[1]))

    def _args_with(self, values: Any, facts: Any) -> tuple[int, ...]:
        word, value, tensor, fact = map(ctypes.addressof, (self._words, values, self._places, facts))
        return word, value, len(self._words), tensor, fact, len(self._places)


def usable() -> bool:
    """Return whether `Unchanged` notices changes in this Python. Builds its library on first use, in a second."""
    return _noticed()


@functools.cache
def _noticed() -> bool:
    """Test `Unchanged`: Python 3.13.0 does not report all changes, and other versions may have other layouts."""
    if sys.implementation.name != "cpython" or sys.maxsize < 2**32:
        return False
    probe: Any = _Probe()
    if _word(id(probe) + TYPE) != id(_Probe) or not _tensor_offset():
        return False
    try:
        return all(_notices(change) for change in _CHANGES)
    except (RuntimeError, AttributeError, OSError, subprocess.SubprocessError):
        return False  # there are no watchers, all are taken, or the library cannot be built


class _Probe:
    """An object that the test changes."""

    def __init__(self) -> None:
        self.value, self.plain, self.ordered = 1, {"key": 1}, OrderedDict(key=1)
        self.tensor = torch.nn.Parameter(torch.zeros(2, 3))


class _Other(_Probe):
    pass


def _swap(probe: Any) -> None:
    torch.utils.swap_tensors(probe.tensor, torch.nn.Parameter(torch.zeros(3, 2)))


_CHANGES: Any = (
    lambda probe: setattr(probe, "value", 2),
    lambda probe: setattr(probe, "other", 2),
    lambda probe: delattr(probe, "value"),
    lambda probe: probe.__dict__.update(value=3),
    lambda probe: probe.plain.pop("key"),
    lambda probe: probe.plain.clear(),
    lambda probe: probe.ordered.update(key=2),
    lambda probe: probe.ordered.popitem(),
    lambda probe: setattr(probe, "__class__", _Other),
    lambda probe: setattr(probe.tensor, "data", torch.zeros(2, 3).double()),
    lambda probe: setattr(probe.tensor, "data", torch.zeros(2, 2)),
    lambda probe: setattr(probe.tensor, "data", torch.zeros(3, 2).t()),
    _swap,
)


def _notices(change: Any) -> bool:
    probe: Any = _Probe()
    state = Unchanged((probe.__dict__, probe.plain, probe.ordered), (probe,), (probe.tensor,))
    before = state.holds()
    change(probe)
    after = state.holds()
    state.remember(state.state())
    return before and not after and state.holds()


def _words(dicts: Collection[dict[Any, Any]]) -> list[int]:
    """Return the addresses of the words that change if the dicts change."""
    if not _HAS_WATCHERS:
        return [id(one) + VERSION for one in dicts]
    for one in dicts:
        ctypes.pythonapi.PyDict_Watch(_watcher(), ctypes.py_object(one))
    return [ctypes.addressof(ctypes.c_uint64.in_dll(_library(), "convmixer_changes"))]


@functools.cache
def _watcher() -> int:
    """Return the id of our dict watcher; the interpreter has only a few ids.

    Raises:
        RuntimeError: All ids are taken.
    """
    return int(ctypes.pythonapi.PyDict_AddWatcher(ctypes.cast(_library().convmixer_changed, ctypes.c_void_p)))


@functools.cache
def _tensor_offset() -> int:
    """Return the offset of the at::Tensor, one pointer, in a tensor's Python object; 0 if it is not found."""
    tensor = torch.nn.Parameter(torch.zeros(1))
    return next((offset for offset in (16, 24) if _word(id(tensor) + offset) == tensor._cdata), 0)


def _word(address: int) -> int:
    return ctypes.c_uint64.from_address(address).value


@functools.cache
def _library() -> ctypes.PyDLL:
    library = ctypes.PyDLL(str(build.library("changes")))  # keeps the GIL, so that nothing changes meanwhile
    pair = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    for name in ("convmixer_remember", "convmixer_same"):
        getattr(library, name).argtypes = (*pair, *pair)
    library.convmixer_facts_bytes.restype = ctypes.c_int64
    return library
