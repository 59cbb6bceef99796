"""What several processes need beyond Lightning's DDP: one process group, equal weights, BatchNorm over all images.

Started by `torchrun`; alone, every function here does nothing.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.rendezvous import rendezvous

from convmixer.errors import RequestError

T = TypeVar("T")


def world_size() -> int:
    """Return the number of processes that torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return this process's number, from 0."""
    return int(os.environ.get("RANK", "0"))


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Connect the processes for the duration of a run: NCCL on GPUs, gloo elsewhere."""
    if world_size() == 1 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if device.type == "cuda" else "gloo"
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        dist.init_process_group(backend, store=_store_of_attempt(), rank=rank(), world_size=world_size())
    else:
        dist.init_process_group(backend)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _store_of_attempt() -> dist.Store:
    """Return torchrun's store with names that differ after each restart.

    torchrun keeps one store for all attempts, with the addresses of the processes that died: a process that reads one
    of those waits forever. Several machines may count their attempts differently, so they keep torchrun's own names.
    """
    store, _, _ = next(rendezvous("env://"))
    return dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def sum_over_processes(values: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def any_process(flag: bool, device: torch.device) -> bool:
    """Return whether the flag is set in any process, so that all act at the same step."""
    return bool(sum_over_processes(torch.tensor(int(flag), device=device))) if world_size() > 1 else flag


def from_first(value: T) -> T:
    """Return the first process's value in all of them."""
    if world_size() == 1:
        return value
    box: list[object] = [value]
    dist.broadcast_object_list(box, src=0)
    return cast(T, box[0])


def on_first(work: Callable[[], T]) -> T:
    """Do something in the first process and return its value in all of them; what it refuses, all refuse."""
    value: Any = None
    if rank() == 0:
        try:
            value = work()
        except RequestError as error:
            value = error
    value = from_first(value)
    if isinstance(value, RequestError):
        raise value
    return cast(T, value)


def copy_from_first(model: nn.Module) -> None:
    """Give all processes the first one's parameters and buffers."""
    if world_size() > 1:
        for tensor in (*model.buffers(), *model.parameters()):
            dist.broadcast(tensor.detach(), src=0)


def average_statistics(model: nn.Module) -> None:
    """Give all processes the mean of their BatchNorm statistics.

    After every step, so that all processes always hold the same model and any of them can write a checkpoint. The
    running mean is then that of all images; the running variance is the mean of the processes' own.
    """
    statistics = [b for b in model.buffers() if b.is_floating_point()]
    if world_size() == 1 or not statistics:
        return
    flat = sum_over_processes(torch.cat([b.flatten().float() for b in statistics])) / world_size()
    for buffer, part in zip(statistics, flat.split([b.numel() for b in statistics]), strict=True):
        buffer.copy_(part.view_as(buffer))


class SyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the images of all processes on any device; torch's own refuses the CPU.

    (B, C, H, W) -> (B, C, H, W). Mean and variance are two sums over processes, the second of centred values: slower
    than one, but without its cancellation.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        values, axes = x.float(), (0, 2, 3)
        count = sum_over_processes(torch.tensor(float(x.numel() // x.shape[1]), device=x.device))
        mean = _Sum.apply(values.sum(axes)) / count  # (C,)
        centred = values - mean[:, None, None]
        variance = _Sum.apply(centred.square().sum(axes)) / count  # (C,)
        self._remember(mean.detach(), variance.detach() * count / (count - 1))
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)

    @torch.no_grad()
    def _remember(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)


class _Sum(torch.autograd.Function):
    """Sum over processes; the gradient of a sum that all processes use is the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        return sum_over_processes(values.clone())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return sum_over_processes(gradient.clone())


def synchronise_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """Return the model with every BatchNorm2d taking its statistics over all processes; parameters stay the same."""
    if device.type == "cuda":
        synced: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return synced
    for name, module in list(model.named_modules()):
        if type(module) is nn.BatchNorm2d:
            new = SyncBatchNorm(module.num_features, module.eps, module.momentum or 0.1)
            new.__dict__.update(module.__dict__)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new)
    return model
