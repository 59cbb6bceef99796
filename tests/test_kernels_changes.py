"""CPython's marks of changes: none is overlooked, and what did not change is not compared."""

import sys
from collections import OrderedDict
from typing import Any

import pytest
import torch

from convmixer.fast import accelerate
from convmixer.fast.structure import Found, found
from convmixer.fast.support import unfit
from convmixer.kernels import why_not
from convmixer.kernels.cpu.changes import Unchanged, usable
from convmixer.models.convmixer import ConvMixer

X = torch.randn(2, 3, 8, 8)


@pytest.fixture(scope="module", autouse=True)
def _marks() -> None:
    if reason := why_not():
        pytest.skip(f"no kernels: {reason}")
    if not usable():
        pytest.skip("this Python marks no changes: all is compared with copies")


def test_this_python_marks_changes() -> None:
    assert usable() or sys.version_info[:3] == (3, 13, 0)


def test_dicts_that_die_while_an_exception_is_under_way_do_not_disturb_it() -> None:
    class Owner:
        pass

    def fail() -> None:
        owner: Any = Owner()
        owner.hooks = OrderedDict(a=1)
        Unchanged((owner.__dict__, owner.hooks), (owner,), ())
        raise KeyError("mine")

    for _ in range(100):
        with pytest.raises(KeyError, match="mine"):
            fail()


def test_an_unchanged_model_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = accelerate(ConvMixer(8, 2, 3, 2, num_classes=5))
    for training in (True, False):
        fast.train(training)(X)
        with monkeypatch.context() as patch:
            patch.setattr(Found, "_equals_copies", lambda self: pytest.fail("compared with copies"))
            with torch.no_grad():
                fast(X), fast(X)
            fast(X).sum().backward()
            assert unfit(fast, X) is None


def test_what_was_changed_and_set_back_is_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fast: Any = accelerate(ConvMixer(8, 2, 3, 2, num_classes=5))
    fast(X)
    before, compared = found(fast), []
    usual = Found._equals_copies
    monkeypatch.setattr(Found, "_equals_copies", lambda self: compared.append(1) or usual(self))
    conv = fast.blocks[0][1]
    conv.stride = (2, 2)
    conv.stride = (1, 1)
    assert found(fast) is before
    assert found(fast) is before
    assert compared == [1]


@pytest.mark.parametrize("watched", [True, False])
def test_tensors_swapped_or_of_other_data_are_seen(watched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not watched:
        monkeypatch.setattr("convmixer.fast.structure.usable", lambda: False)
    for change in (
        lambda conv: setattr(conv.weight, "data", torch.randn(8, 1, 5, 5)),
        lambda conv: setattr(conv.bias, "data", conv.bias.data.double()),
        lambda conv: torch.utils.swap_tensors(conv.weight, torch.nn.Parameter(torch.randn(8, 1, 1, 1))),
    ):
        fast: Any = accelerate(ConvMixer(8, 2, 3, 2, num_classes=5))
        with torch.no_grad():
            fast(X)
        assert (found(fast).marks is not None) is watched
        change(fast.blocks[0][0].fn[0])
        assert unfit(fast, X) is not None
