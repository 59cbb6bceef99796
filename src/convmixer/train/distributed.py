"""What several processes need beyond Lightning's DDP: one process group, equal weights, BatchNorm over all images.

`torchrun` starts the processes. With a single process, the functions here neither communicate nor change anything.
"""

import contextlib
import os
import re
import socket
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.nn as nn

from convmixer.errors import PeerLost, RequestError, shown
from convmixer.train.meeting import Meeting, under_torchrun

T = TypeVar("T")
_OF_A_CONNECTION = re.compile(r"gloo|NCCL|TCPStore|[Cc]onnection (closed|reset|refused)|[Tt]imed? ?out")
_SOURCE = re.compile(r"^\[\S+:\d+\] ")  # the line of torch's source that an error begins with
_meeting: Meeting | None = None  # the processes of the open process group


def world_size() -> int:
    """Return the number of processes that torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return this process's index, from 0."""
    return int(os.environ.get("RANK", "0"))


@contextlib.contextmanager
def process_group(device: torch.device, seconds: float) -> Iterator[bool]:
    """Connect the processes for the duration of a run: NCCL on GPUs, gloo elsewhere.

    Args:
        device: Where this process computes.
        seconds: How long a process waits for another one before it gives up.

    Yields:
        Whether torchrun started the processes again after one was lost.

    Raises:
        PeerLost: Another process does not answer.
    """
    global _meeting
    if dist.is_initialized() or not (world_size() > 1 or under_torchrun()):
        yield False
        return
    with _naming_the_lost():
        _meeting = Meeting(rank(), world_size(), seconds)
        try:
            with _group(device, _meeting):
                yield _meeting.restarted
        finally:
            _meeting = None


@contextlib.contextmanager
def _group(device: torch.device, meeting: Meeting) -> Iterator[None]:
    if world_size() == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if device.type == "cuda" else "gloo"
    limit = timedelta(seconds=meeting.seconds)
    dist.init_process_group(backend, store=meeting.store, rank=rank(), world_size=world_size(), timeout=limit)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _naming_the_lost() -> Iterator[None]:
    """Turn torch's connection errors into one line that names the remedy."""
    try:
        yield
    except RuntimeError as error:
        text = _SOURCE.sub("", " ".join(str(error).split()))[:200]
        if isinstance(error, PeerLost) or not (isinstance(error, dist.DistError) or _OF_A_CONNECTION.search(text)):
            raise
        raise PeerLost(
            f"process {rank()} on {socket.gethostname()} lost the connection to another process ({text}); the last "
            "checkpoint is kept, continue with --resume"
        ) from error


def everywhere(work: Callable[[], T]) -> T:
    """Do work whose duration may differ greatly between processes; see `Meeting.everywhere`."""
    return work() if _meeting is None else _meeting.everywhere(work)


def check_equal(facts: dict[str, Any]) -> None:
    """Check that facts, for instance about the data, are equal in all processes.

    Args:
        facts: Name of each fact -> its value in this process.

    Raises:
        RequestError: A fact differs between two processes.
    """
    if world_size() == 1:
        return
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, (socket.gethostname(), facts))
    (first_host, first), *others = found
    for number, (host, other) in enumerate(others, 1):
        for name in facts:
            if other[name] != first[name]:
                raise RequestError(
                    f"the processes differ in {name}: {shown(first[name])} in process 0 on {first_host}, "
                    f"{shown(other[name])} in process {number} on {host}"
                )


def sum_over_processes(values: torch.Tensor) -> torch.Tensor:
    """Replace a tensor by its sum over all processes, and return it."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def any_process(flag: bool, device: torch.device) -> bool:
    """Return whether the flag is set in any process: the same answer in all, so that all act at the same step."""
    return bool(sum_over_processes(torch.tensor(int(flag), device=device))) if world_size() > 1 else flag


def from_first(value: T) -> T:
    """Return the first process's value, in every process."""
    if world_size() == 1:
        return value
    box: list[object] = [value]
    dist.broadcast_object_list(box, src=0)
    return cast(T, box[0])


def on_first(work: Callable[[], T]) -> T:
    """Call a function in the first process and return its value in all; if it raises RequestError, all raise it."""
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

    It is called after every step, so all processes always hold the same model and any of them can write a checkpoint.
    The running mean is then that of all images; the running variance is the mean of the processes' variances.
    """
    statistics = [b for b in model.buffers() if b.is_floating_point()]
    if world_size() == 1 or not statistics:
        return
    flat = sum_over_processes(torch.cat([b.flatten().float() for b in statistics])) / world_size()
    for buffer, part in zip(statistics, flat.split([b.numel() for b in statistics]), strict=True):
        buffer.copy_(part.view_as(buffer))


class SyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the images of all processes, on any device; torch's SyncBatchNorm refuses the CPU.

    (B, C, H, W) -> (B, C, H, W). The values are summed over processes to get the mean, and then the squares of the
    centred values to get the variance. Summing values and squares at once would be faster, but would lose digits
    by cancellation.
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
    """Sum over processes. All processes use the sum, so its gradient is the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        return sum_over_processes(values.clone())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return sum_over_processes(gradient.clone())


def synchronise_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """Return the model with every BatchNorm2d replaced by one over all processes; the parameters stay the same."""
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
