"""The stages of a run. Without `freeze` there is one stage. With `freeze` the first stage does not train the frozen
layers; a second stage may follow and train all layers.
"""

import copy
from functools import partial
from typing import Any

import torch
import torch.nn as nn

from convmixer.data.loader import Loader
from convmixer.train import features
from convmixer.train.budget import Budget
from convmixer.train.features import Features
from convmixer.train.freeze import classifier_of, freeze
from convmixer.train.plans import Plan
from convmixer.train.scores import Scores, score
from convmixer.train.setup import Job


class Stage:
    """A stage in progress.

    Args:
        job: What is trained.
        plan: Which layers are trained, and when.
        cached: Features to train the classifier on; None: train on images.
        budget: The run's time budget; None: the run has a fixed number of steps.

    Attributes:
        module: The module that takes the steps.
        best: If the classifier is trained on features, its best weights so far.
    """

    def __init__(self, job: Job, plan: Plan, cached: Features | None, budget: Budget | None = None) -> None:
        freeze(job.model, plan.freeze)
        progress = partial(budget.progress, plan) if budget else None
        self.job, self.plan, self.features = job, plan, cached
        if cached:
            self.module = features.head_module(job, plan.epochs, progress)
            self._whole = copy.deepcopy(job.model)
            self._val: Any = cached.val_batches()
        else:
            self.module = job.module(plan.epochs, plan.first, plan.lr, progress=progress)
            self._val = job.eval_loader("val")
        self.best: dict[str, torch.Tensor] | None = None
        self._train: Any = None

    def train_loader(self) -> Any:
        """Return an endless loader that begins with the batches of the next step."""
        step = self.module.steps_done
        self._train = self.features.train_loader(self.job, step) if self.features else self.job.train_loader(step)
        return self._train

    def close(self) -> None:
        """End the worker processes of the loaders; the next pass over a loader starts new ones."""
        for loader in (self._train, self._val):
            if isinstance(loader, Loader):
                loader.close()

    def score_val(self) -> Scores | None:
        """Return the scores on the validation split, or None if there is no such split."""
        if self._val is None:
            return None
        classes = len(self.job.data.classes)
        return score(self.module.evaluated, self._val, classes, self.job.device, self.module.autocast)

    def keep_best(self) -> None:
        """Remember the classifier's weights as the best, if it is trained on features."""
        if self.features:
            self.best = {key: value.clone() for key, value in self.module.evaluated.state_dict().items()}

    def whole(self, best: bool = False) -> nn.Module:
        """Return the network with all layers, with the best or (the default) the newest of the evaluated weights."""
        if not self.features:
            return self.module.evaluated
        state = self.best if best else self.module.evaluated.state_dict()
        found = classifier_of(self._whole)
        assert state is not None
        assert found is not None
        found[1].load_state_dict({key.removeprefix(features.PREFIX): value for key, value in state.items()})
        return self._whole

    def finish(self) -> None:
        """Give the job's model the weights that were evaluated last."""
        if self.whole() is not self.job.model:
            self.job.model.load_state_dict(self.whole().state_dict())
