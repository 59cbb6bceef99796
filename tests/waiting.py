"""A mode that refuses every operation for which a GPU step would wait."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
# they return sizes or numbers that depend on values
_READS = {
    _aten._local_scalar_dense.default,
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten.equal.default,
    _aten.unique_dim.default,
    _aten._unique2.default,
    _aten.repeat_interleave.Tensor,
    _aten.bincount.default,
}


class NoWaiting(TorchDispatchMode):
    """Raises an AssertionError if a number is read from a tensor, or a tensor is copied to or from the host.

    On a GPU each of these waits for all that was launched before.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in _READS, f"a step reads a number from a tensor: {func}"
        if func in (_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default):
            kinds = {index.dtype for index in args[1] if index is not None}
            assert not kinds & {torch.bool, torch.uint8}, f"a step indexes by a mask: {func}"
        out = func(*args, **(kwargs or {}))
        if func in (_aten._to_copy.default, _aten.copy_.default):
            places = {t.device.type for t in (out, *args) if isinstance(t, torch.Tensor) and t.ndim}
            assert len(places) < 2, f"a step copies between {' and '.join(sorted(places))}"
        return out
