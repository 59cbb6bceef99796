"""One optimizer step: mixing, erasing, soft-target cross entropy, clipping, optimizer, moving average.

A step is a pure function of the weights, the optimizer's state, the batch and the step number. The step number
determines the learning rate and every random number, so a checkpoint holds no scheduler and no generator. With
`grad_accum` the batch is computed in several parts, but that is still one step. session.py does what happens between
steps.
"""

import contextlib
from collections.abc import Callable
from typing import Any, cast

import pytorch_lightning as pl
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.utils import ModelEmaV3

from convmixer.config import Config
from convmixer.data.sampler import sample_seed
from convmixer.data.transforms import erase, mix
from convmixer.train.distributed import average_statistics, rank, world_size
from convmixer.train.freeze import frozen_modules
from convmixer.train.graph import StepGraph
from convmixer.train.optim import build_optimizer, set_rate
from convmixer.train.schedule import learning_rate, rate_at_step


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return the context in which a model computes in fp32, tf32, bf16 or fp16."""
    if precision in ("fp32", "tf32"):
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16 if precision == "bf16" else torch.float16)


class TrainingModule(pl.LightningModule):
    """A model and everything that a step needs.

    Args:
        model: The model, on its device; trained in place.
        config: Settings; `precision` resolved to fp32, tf32, bf16 or fp16.
        num_classes: Classes of the data.
        steps_per_epoch: Optimizer steps per epoch.
        epochs: Length of the schedule in epochs; may be a fraction.
        first_step: Number of steps of the run before this module's first step.
        progress: Step number -> how far the schedule is at the end of the step, 0 to 1. None: in proportion to the
            number of the step.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        *,
        num_classes: int,
        steps_per_epoch: int,
        epochs: float,
        first_step: int = 0,
        progress: Callable[[int], float] | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model, self.config, self.num_classes = model, config, num_classes
        self.steps_per_epoch, self.epochs, self.progress = steps_per_epoch, epochs, progress
        self.place = next(model.parameters()).device
        self.optimizer = build_optimizer(model, config)
        self.scaler = torch.amp.GradScaler(self.place.type, enabled=config.precision == "fp16")
        # in a list, so that Lightning and DDP do not train it as a submodule
        self._average = [ModelEmaV3(model, config.ema_decay, use_warmup=True)] if config.ema_decay else []
        self._frozen = frozen_modules(model)
        self.first_step = self.steps_done = first_step
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self._sum_device())
        self._update: Callable[[torch.Tensor, torch.Tensor], None] = self._take_step
        if self._can_be_a_graph():
            self._update = StepGraph(self._take_step)
        self.in_step = False
        self._generator = torch.Generator()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer

    @property
    def evaluated(self) -> nn.Module:
        """The model to evaluate and save: the moving average if there is one."""
        return cast(nn.Module, self._average[0].module) if self._average else self.model

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        if self.progress:
            return learning_rate(self.config.schedule, self.progress(self.steps_done), 1.0, self.config.lr)
        c, done = self.config, self.steps_done - self.first_step
        return rate_at_step(c.schedule, done, self.steps_per_epoch, self.epochs, c.lr)

    def train(self, mode: bool = True) -> "TrainingModule":
        """Set the mode of all modules except frozen ones, whose BatchNorm keeps its statistics."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def training_step(self, batch: tuple[torch.Tensor, ...], batch_idx: int) -> None:
        """Take one optimizer step on images (B, C, H, W), labels (B,) and, if given, weights (B,)."""
        self.in_step = True
        self._seed()
        images, labels, *weights = batch
        images, targets = mix(images, labels, self.num_classes, self.config, self._generator, *weights)
        images = erase(images, self.config, self._generator)
        set_rate(self.optimizer, self.rate)
        self._update(images, targets)
        self.steps_done += 1
        average_statistics(self.model)
        if self._average:
            self._average[0].update(self.model, self.steps_done - self.first_step)
        self.in_step = False

    def forget_graph(self) -> None:
        """Drop the CUDA graph, because tensors of the step are about to be replaced."""
        if isinstance(self._update, StepGraph):
            self._update.forget()

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which the model computes in the run's precision."""
        return autocast(self.config.precision, self.place)

    def state(self) -> dict[str, Any]:
        """Return everything that the next steps depend on, for a checkpoint."""
        return {
            "model": self.model.state_dict(),
            "average": self._average[0].module.state_dict() if self._average else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "steps_done": self.steps_done,
            "loss_sum": self.loss_sum,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a state that `state` returned, on any device."""
        self.forget_graph()
        self.model.load_state_dict(state["model"])
        if self._average:
            self._average[0].module.load_state_dict(state["average"])
        kept = ("lr", "fused", "capturable")
        own: list[dict[str, Any]] = [{key: g[key] for key in kept if key in g} for g in self._groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, of_this_device in zip(self._groups, own, strict=True):
            group |= of_this_device
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.steps_done = state["steps_done"]
        self.loss_sum.copy_(state["loss_sum"])

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def _sum_device(self) -> torch.device:
        """Return the device on which losses are added in float64.

        It is the model's device, so that no step waits for a copy. MPS has no float64, so there it is the CPU.
        """
        return torch.device("cpu") if self.place.type == "mps" else self.place

    def _can_be_a_graph(self) -> bool:
        """Return whether a step never waits for the GPU. With DDP, fp16's scaler or most optimizers it does wait.

        The learning rate has to be a tensor: a graph would use a number again at every replay.
        """
        tensors = all(isinstance(group["lr"], torch.Tensor) for group in self.optimizer.param_groups)
        return tensors and world_size() == 1 and self.place.type == "cuda"

    def _take_step(self, images: torch.Tensor, targets: torch.Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._gradients(images, targets)
        self.scaler.unscale_(self.optimizer)
        if self.config.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.loss_sum += loss.to(self.loss_sum.device)

    def _gradients(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Compute the gradients of the batch's mean loss and return that loss."""
        total = torch.zeros((), device=images.device)
        parts = self.config.grad_accum
        for part, target in zip(images.chunk(parts), targets.chunk(parts), strict=True):
            with self.autocast():
                logits = self.model(part)
            loss = F.cross_entropy(logits.float(), target) * (len(part) / len(images))
            self.manual_backward(self.scaler.scale(loss))
            total += loss.detach()
        return total

    def _seed(self) -> None:
        """Key every random number of this step (dropout, mixing, erasing) by seed, step and rank.

        It is called after the batch was fetched, because fetching draws from the same generators. `torch.manual_seed`
        would cost 144 microseconds per step.
        """
        # the second argument is below 0, because images are keyed by their epoch, which is 0 or more
        key = sample_seed(self.config.seed, -1 - rank(), self.steps_done)
        torch.default_generator.manual_seed(key)
        if self.place.type == "cuda":
            torch.cuda.manual_seed(key)
        elif self.place.type == "mps":
            torch.mps.manual_seed(key)
        self._generator.manual_seed(key)
