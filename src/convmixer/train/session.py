"""A run in progress: what happens after each step, after each epoch and at the end."""

import dataclasses
import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.nn as nn
from rich.console import Console

from convmixer import records
from convmixer.config import to_dict
from convmixer.data.loader import Loader
from convmixer.data.watch import Watch
from convmixer.files import write_atomic
from convmixer.models.inspection import kernel_growth, kernel_structure
from convmixer.models.weights import load_model, save_model
from convmixer.run_folder import BEST, LAST, LATEST, MODEL, SHARES
from convmixer.seal import make_seal
from convmixer.text import terminal
from convmixer.train import features, gallery
from convmixer.train.budget import Budget
from convmixer.train.checkpoint import save_checkpoint
from convmixer.train.distributed import any_process, copy_from_first, rank, sum_over_processes, world_size
from convmixer.train.engine import StopSignals, fit
from convmixer.train.fits import FEWEST_EPOCHS, what_fits
from convmixer.train.folder import RunFiles, model_card
from convmixer.train.freeze import ALL
from convmixer.train.lock import RunLock
from convmixer.train.loggers import open_loggers
from convmixer.train.messages import epoch_line, say_results, say_settings, slow_loading
from convmixer.train.module import TrainingModule, autocast
from convmixer.train.plans import plans_of
from convmixer.train.progress import Progress
from convmixer.train.scores import Scores, score
from convmixer.train.setup import Job
from convmixer.train.stages import Stage
from convmixer.train.steps import StepRows

OnEpoch = Callable[[dict[str, Any]], None]
WEIGHTS_SECONDS = 10.0  # least time between two saves of all weights while only the classifier is trained
FINISH_SECONDS = 0.7  # time for the files that a run writes at its end, without pictures
DRAWN_AT_END = 3.0  # time for the pictures at the end, as a multiple of the time for those at the start
MOST_DRAWN_SHARE = 0.15  # of a time budget: if the pictures may take more, they are not drawn to measure the time
KNOWN_AFTER = 10  # steps after which the speed is known well enough to say how many epochs fit
ENDLESS = 10**9  # steps of a stage without a fixed number: only the time ends it
ASK_EVERY = 16  # with several processes, steps between checks whether all should save and stop
SLOW_LOADING = 0.3  # share of an epoch spent waiting for images
SIGNAL_SECONDS = 2.0  # how long to wait for our own signal after a worker was killed by one


class Run:
    """A run in progress.

    Args:
        job: What is trained.
        folder: The run folder.
        contents: Contents of the settings file.
        started: When this session began, seconds since 1970.
        lock: The lock on the folder, held by the first process; None in other processes.
        on_epoch, quiet, callbacks: See `run.train`.
    """

    def __init__(
        self,
        job: Job,
        folder: RunFiles,
        contents: dict[str, Any],
        started: float,
        lock: RunLock | None = None,
        on_epoch: OnEpoch | None = None,
        quiet: bool = False,
        callbacks: Sequence[Any] = (),
    ) -> None:
        self.on_epoch, self.callbacks = on_epoch, callbacks
        self.job, self.folder, self.contents, self.started, self.lock = job, folder, contents, started, lock
        self.config, self.schedule = job.config, contents["schedule"]
        self.steps_per_epoch, self.plans = job.steps_per_epoch, plans_of(self.config, self.schedule)
        self.console = Console(quiet=quiet or rank() != 0, soft_wrap=True, highlight=False, markup=False)
        self.rows: list[dict[str, Any]] = []
        self.steps = StepRows(job.batch_size, job.device)
        self.best: dict[str, Any] = {}
        self.seconds_before = 0.0  # seconds of earlier sessions
        self._validation_seconds = 0.0  # seconds of the last evaluation of the whole model
        self.training_seconds, self.trained_images = 0.0, 0
        self.signals = StopSignals()
        seconds = self.schedule.get("seconds")  # runs of older versions have none
        self.budget = Budget(seconds, self._seconds, folder.checkpoints / SHARES) if seconds else None
        self._weights_at = -math.inf
        self._saved_at = time.monotonic()
        self._out_of_time = self._told_to_stop = self._best_is_new = self._said_length = self._finished = False
        self._loggers = open_loggers(self.config.logger, folder, contents, self._say_of_logger)
        self._watch = Watch(job.spec, job.data.checksum, job.data.options) if self.writes else None
        self.data_changed: list[float] = []  # epochs at whose end the data were found changed

    @property
    def writes(self) -> bool:
        """Whether this process writes the files."""
        return rank() == 0

    @property
    def module(self) -> TrainingModule:
        """The module that takes the steps of the current stage."""
        return self.stage.module

    def begin(self) -> None:
        """Write and print everything that was decided before the first step."""
        say_settings(self.console, self.job, self.folder, self.contents)
        if self.writes:
            self.folder.write_config(self.contents)
            self.folder.write_metrics([])
            self.folder.log("start", 0, {"command": self.contents["command"]})
            self._show_images()
        self._enter(0)

    def _show_images(self) -> None:
        began = time.perf_counter()
        if self.config.draw:
            gallery.augmented(self.job, self.folder.pictures / "augmented.png")
            gallery.samples(self.job.data, self.folder.samples)
        if self.budget:
            self.budget.writing = FINISH_SECONDS + DRAWN_AT_END * (time.perf_counter() - began)

    def _rehearse(self, found: Scores | None) -> None:
        """After the first epoch, draw the pictures to measure how long that takes at the end, and delete them."""
        budget = self.budget
        if not (budget and self.writes and self.config.draw) or len(self.rows) != 1:
            return
        if budget.slowdown * budget.writing < MOST_DRAWN_SHARE * budget.seconds:
            seconds = gallery.rehearse(self.job, self.rows, self.steps.rows, self.stage.whole(), found)
            budget.writing = FINISH_SECONDS + seconds / budget.slowdown

    def restore(self, state: dict[str, Any] | None, new_length: bool = False) -> None:
        """Go back to a checkpoint.

        Args:
            state: The checkpoint's state; None: begin the run.
            new_length: Whether the length of the run was changed since.
        """
        if self.budget:
            done, seconds = (state["module"]["steps_done"], state["seconds"]) if state else (0, 0.0)
            self.seconds_before = self.budget.restore(done, seconds if new_length else None)
        self._enter(state.get("stage", 0) if state else 0, state.get("first_step", 0) if state else 0, state)
        if state:
            before = self.seconds_before
            self.module.restore(state["module"])
            self.stage.best = state.get("best_head")
            self._best_is_new = self.stage.best is not None
            self.rows, self.best, self.seconds_before = state["rows"], state["best"], state["seconds"]
            self.training_seconds, self.trained_images = state["training_seconds"], state["trained_images"]
            self.seconds_before = max(before, self.seconds_before)
            self.data_changed = state.get("data_changed", [])
            self.steps.restore(state.get("steps"), self.module.steps_done)
        step = self.module.steps_done
        self.console.print(f"resuming {terminal(self.folder.path)} at step {step}{self._length()}")
        if self.writes:
            self.folder.rewind_log(step)
            self.folder.write_metrics(self.rows)
            for logger in self._loggers:
                logger.rewind(step)
            self.folder.log("resume", step, {"command": records.command_line()})
            if state is None:  # the first session may have ended before it wrote them
                self._show_images()

    def to_the_end(self) -> dict[str, Any]:
        """Train what is left, measure the chosen weights, and return the result."""
        try:
            return self._to_the_end()
        finally:
            for logger in self._loggers:
                logger.close(self._finished)

    def _to_the_end(self) -> dict[str, Any]:
        with self.signals, Progress(self.console, self.job.batch_size) as self.bar:
            self._train()
            while self.stage_number + 1 < len(self.plans) and not self._out_of_time:
                self._write_weights()
                self.stage.finish()
                self._enter(self.stage_number + 1, self.module.steps_done)
                self._train()
        return self._finish()

    def _enter(self, number: int, first_step: int = 0, resumes: Any = None) -> None:
        """Begin a stage.

        Args:
            number: Index of the stage.
            first_step: Steps of the run that are done.
            resumes: State of the stage in a checkpoint, if the run resumes in this stage; the caller then calls
                `module.restore`.
        """
        plan, start = dataclasses.replace(self.plans[number], first=first_step), self.folder.checkpoints / "start"
        cached = None
        if plan.freeze and resumes and (start / MODEL).exists():
            self.job.model.load_state_dict(load_model(start).model.state_dict())
        if plan.freeze == ALL and (reason := features.why_not(self.job)):
            self.console.print(f"freeze   every step computes the frozen layers: {reason}")
        elif plan.freeze == ALL:
            if self.writes and not resumes:  # checkpoints of this stage hold only the classifier
                self._save_weights(start, self.job.model, {"epoch": 0, "top1": None})
            cached = features.compute(self.job)
            self.console.print(f"features {cached.said}")
        self.stage_number, self.stage = number, Stage(self.job, plan, cached, self.budget)
        if self.budget:
            self.budget.measure(self.module, self.job)

    def _train(self) -> None:
        """Take the steps of the stage that are left."""
        end, done = self.stage.plan.end, self.module.steps_done
        left = ENDLESS if end is None else end - done
        if self.budget and done and (self.budget.is_over(done) or self.budget.ends_stage(self.stage.plan, done)):
            left, self._out_of_time = 0, self.budget.is_over(done)
        if left > 0 and not self._lost_patience():
            self.loader = self.stage.train_loader()
            if isinstance(self.loader, Loader):
                self.loader.say = self._say_of_loader
            self._new_epoch()
            try:
                fit(self.module, self.loader, left, self._after_step, self.callbacks)
            except RuntimeError as error:
                # systemd and SLURM signal the loader's workers too, which then end in the middle of a step
                if not self._signalled_soon(error):
                    raise
                self._exit("stopped; the last checkpoint is kept;")
            finally:
                self.stage.close()
        if self._told_to_stop and not self._is_last_step():
            self._exit("stopped and saved;")

    def _say_of_loader(self, line: str) -> None:
        self.console.print(f"loader   {line}")
        if self.writes:
            self.folder.log("loader", self.module.steps_done, {"line": line})

    def _say_of_logger(self, line: str) -> None:
        self.console.print(f"logger   {line}")

    def _signalled_soon(self, error: RuntimeError) -> bool:
        """Return whether a signal that killed a loader worker reaches this process too within SIGNAL_SECONDS."""
        deadline = time.monotonic() + SIGNAL_SECONDS
        while self.signals.received is None and "killed by signal" in str(error) and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.signals.received is not None

    # After each step

    def _after_step(self) -> bool:
        """Do what is due after a step, and return whether the training of the stage ends here."""
        if self.lock:
            self.lock.check()
        done = self.module.steps_done
        self.bar.update(done, self._share_done())
        self._say_if_short(done)
        over = self._stage_is_over(done)
        ends_epoch = done % self.steps_per_epoch == 0 or over
        rate = self.module.optimizer.param_groups[0]["lr"]
        self.steps.add(done, self.module.loss_sum, rate, self._share_done(), ends_epoch)
        if ends_epoch:
            self._end_epoch()
            over = over or self._stage_is_over(done)  # the epoch's end took time too
        stop = self._wants_to_stop(ends_epoch)
        if ends_epoch or stop or self._checkpoint_is_due():
            self._save_checkpoint()
        if ends_epoch:
            self._new_epoch()
        return stop or over

    def _stage_is_over(self, done: int) -> bool:
        """Return whether the stage ends after step `done`: by its length, the time, or lost patience."""
        if self.budget:
            self.budget.look()
            self._out_of_time = self.budget.is_over(done)
            if self._out_of_time or self.budget.ends_stage(self.stage.plan, done):
                return True
        return done == self.stage.plan.end or self._lost_patience()

    def _lost_patience(self) -> bool:
        """Return whether the last `patience` epochs of the stage brought no new best."""
        if not self.config.patience or not self.rows:
            return False
        began = self.stage.plan.first / self.steps_per_epoch
        return bool(self.rows[-1]["epoch"] - max(self.best["epoch"], began) >= self.config.patience)

    def _say_if_short(self, done: int) -> None:
        """Print once, as soon as the speed is known, if too few epochs fit into the time to learn much."""
        if not self.budget or self._said_length or (done != KNOWN_AFTER and self._share_done() < 0.05):
            return
        self._said_length = True
        epochs = self.budget.epochs(self.steps_per_epoch, done)
        if epochs < FEWEST_EPOCHS and not self.stage.features:
            reading = self.loader.waited_seconds / self.budget.seconds_of(done)
            self.console.print(f"time     {what_fits(self.job, epochs, min(1.0, reading))}")

    def _is_last_step(self) -> bool:
        last = self.stage_number + 1 == len(self.plans)
        ended = self.module.steps_done == self.stage.plan.end or self._lost_patience()
        return self._out_of_time or (last and ended)

    def _share_done(self) -> float:
        """Return how far the run is, 0 to 1."""
        if self.budget:
            return self.budget.share(self.module.steps_done - 1)
        return float(self.module.steps_done / self.schedule["steps"])

    def _length(self) -> str:
        """Return the length of the run as a text to print after the number of a step."""
        return f" ({self.config.max_time} in all)" if self.budget else f" of {self.schedule['steps']}"

    def _wants_to_stop(self, ends_epoch: bool) -> bool:
        if world_size() > 1 and not ends_epoch and self.module.steps_done % ASK_EVERY:
            return False
        self._told_to_stop = any_process(self.signals.received is not None, self.job.device)
        return self._told_to_stop

    def _checkpoint_is_due(self) -> bool:
        # only the first process writes, so the others need not know
        return self.writes and time.monotonic() - self._saved_at > self.config.checkpoint_seconds

    def _save_checkpoint(self) -> None:
        if self.writes:
            # a checkpoint with a non-finite loss must not replace a good one
            self._check_finite(float(self.module.loss_sum))
            state = {
                "module": self.module.state(),
                "stage": self.stage_number,
                "first_step": self.stage.plan.first,
                "best_head": self.stage.best,
                "rows": self.rows,
                "steps": self.steps.state(),
                "best": self.best,
                "seconds": self._seconds(),
                "training_seconds": self.training_seconds,
                "trained_images": self.trained_images,
                "data_changed": self.data_changed,
            }
            save_checkpoint(self.folder.checkpoints, state)
            self._saved_at = time.monotonic()

    def _check_finite(self, loss: float) -> None:
        """Raise if the loss or a weight is not finite. Weights are checked too, because the last step changed them
        after its loss was computed.
        """
        if not math.isfinite(loss):
            what = f"the training loss is {loss} at step {self.module.steps_done}"
        elif not all(torch.isfinite(p).all() for p in self.module.model.parameters()):
            what = f"weights are not finite after step {self.module.steps_done}"
        else:
            return
        there = (self.folder.checkpoints / LATEST).exists()
        raise FloatingPointError(
            f"{what}: lower lr (now {self.config.lr:g}), raise eps or set clip_norm; "
            + ("the previous checkpoint is kept" if there else "no checkpoint was written before")
        )

    def _exit(self, how: str) -> NoReturn:
        number = self.signals.received or signal.SIGTERM  # another process may have got the signal
        if self.writes:
            self.folder.log("stopped", self.module.steps_done, {"signal": number})
        self.console.print(f"{how} continue with: convmixer train --resume {terminal(self.folder.path)}")
        raise SystemExit(128 + number)

    # At the end of an epoch

    def _new_epoch(self) -> None:
        self._epoch_began, self._epoch_first = time.perf_counter(), self.module.steps_done
        self.loader.waited_seconds = 0.0
        self.steps.new_epoch()

    def _end_epoch(self) -> None:
        began = time.perf_counter()
        row, found = self._measure_epoch()
        self.rows.append(row)
        better = not self.best or not self.job.data.val or _rank(row) > _rank(self.best)
        if better:
            self.best = row
            self.stage.keep_best()
        self.console.print(epoch_line(row, self._place(), better and bool(self.job.data.val)))
        # not in the first epoch, in which workers start and caches fill
        if row["loader_share"] > SLOW_LOADING and len(self.rows) == 2:
            self._say_of_loader(slow_loading(row["loader_share"], self.job))
        self._best_is_new |= better
        # an epoch on features takes less time than writing the weights of a large model
        if not self.stage.features or time.monotonic() - self._weights_at > WEIGHTS_SECONDS:
            self._write_weights()
        if self.writes:
            self.folder.write_metrics(self.rows)
            self.folder.write_steps(self.steps.rows)
            kernels = kernel_growth(self.stage.whole())
            self.folder.log("epoch", self.module.steps_done, {**row, "kernels": kernels})
            for logger in self._loggers:
                logger.add_row(row)
            self._look_at_data(row)
        if self.on_epoch:
            self.on_epoch(row)
        if self.budget:
            seconds = time.perf_counter() - began
            self._rehearse(found)
            self.budget.saw_end_of_epoch(seconds, self._validation_seconds)

    def _place(self) -> str:
        """Return how far the run is as a text to print after the number of an epoch."""
        return f", {100 * self._share_done():.0f}% of the time" if self.budget else f"/{self.schedule['epochs']:g}"

    def _look_at_data(self, row: dict[str, Any]) -> None:
        assert self._watch is not None
        if change := self._watch.changed():
            self.data_changed.append(row["epoch"])
            self.folder.log("data_changed", self.module.steps_done, {"epoch": row["epoch"], "what": change})
            self.console.print(
                f"data     {self.job.data.name} changed while this run trains: {change}; "
                "the run continues on the changed data, but cannot be resumed with them"
            )

    def _measure_epoch(self) -> tuple[dict[str, Any], Scores | None]:
        module, done = self.module, self.module.steps_done
        steps = (done - 1) % self.steps_per_epoch + 1
        train_loss = float(sum_over_processes(module.loss_sum.clone())) / (steps * world_size())  # waits for a GPU
        seconds = time.perf_counter() - self._epoch_began
        images = (done - self._epoch_first) * self.job.batch_size
        self.training_seconds += seconds
        self.trained_images += images
        module.loss_sum.zero_()
        self._check_finite(train_loss)
        began = time.perf_counter()
        found = self.stage.score_val()
        whole = found is not None and not self.stage.features  # features have been computed before
        self._validation_seconds = time.perf_counter() - began if whole else 0.0
        row = {
            "epoch": round(done / self.steps_per_epoch, 6),
            "step": done,
            "lr": float(module.optimizer.param_groups[0]["lr"]),
            "train_loss": train_loss,
            "val_loss": found and found.loss,
            "top1": found and found.top1,
            "top5": found and found.top5,
            "images_per_second": images / seconds,
            "loader_share": self.loader.waited_seconds / seconds,
            "seconds": self._seconds(),
        }
        return row, found

    def _write_weights(self) -> None:
        """Write the newest weights, and the best ones if they are not on disk."""
        if self.writes and self.rows:
            self._save_weights(self.folder.weights(LAST), self.stage.whole(), self.rows[-1])
            if self._best_is_new:
                self._save_weights(self.folder.weights(BEST), self.stage.whole(best=True), self.best)
        self._best_is_new, self._weights_at = False, time.monotonic()

    def _save_weights(self, folder: Path, model: nn.Module, row: dict[str, Any]) -> None:
        c, (name, args) = self.config, self.job.build
        save_model(
            folder,
            model,
            architecture=name,
            model_args=args,
            classes=self.job.data.classes,
            preprocessing=self.job.preprocessing,
            data={
                "spec": self.job.spec,
                "seal": make_seal(self.job.spec),
                "checksum": self.job.data.checksum,
                "val_fraction": c.val_fraction,
                "test_fraction": c.test_fraction,
                "seed": c.seed,
                "fraction": c.fraction,
                "max_bad_fraction": c.max_bad_fraction,
                "img_size": c.img_size,
                "options": self.job.data.options.given(),
                "bits": self.job.data.bits,
            },
            recipe=self.contents["recipe"],
            epoch=row["epoch"],
            val_top1=row["top1"],
        )

    # At the end

    def _finish(self) -> dict[str, Any]:
        model = self.stage.whole()
        if self.writes:
            if self.stage.features:
                self._write_weights()
            model.load_state_dict(load_model(self.folder.weights(BEST)).model.state_dict())
        copy_from_first(model)
        draw = self.config.draw  # the page of mistakes needs each answer
        test = self._score(model, "test", answers=draw) if self.config.test else None
        val = self._score(model, "val", answers=draw and not test)
        results = self._results(val, test)
        if self._lost_patience():
            self.console.print(f"stopped  no better epoch in the last {self.config.patience} (patience)")
        say_results(self.console, self.folder, results)
        if self.writes:
            self._write_results(results, model, test or val)
        return summary(self.folder, results)

    def _score(self, model: nn.Module, split: str, answers: bool) -> Scores | None:
        loader, classes = self.job.eval_loader(split), len(self.job.data.classes)
        how = partial(autocast, self.config.precision, self.job.device)
        images = getattr(self.job.data, split) if answers else None
        return score(model, loader, classes, self.job.device, how, images) if loader else None

    def _results(self, val: Scores | None, test: Scores | None) -> dict[str, Any]:
        chosen = "the last epoch, nothing is held out"
        if self.job.data.val:
            chosen = f"epoch {self.best['epoch']:g}, the best on the validation split"
        results: dict[str, Any] = {"chosen": chosen}
        for split, found in (("val", val), ("test", test)):
            for key in ("n", "top1", "top5", "loss"):
                results[f"{split}_{key}"] = getattr(found, key) if found else None
        return results | {
            "epochs": self.rows[-1]["epoch"],
            "steps": self.module.steps_done,
            "train_loss": self.rows[-1]["train_loss"],
            "seconds": self._seconds(),
            "images_per_second": self.trained_images / max(self.training_seconds, 1e-9),
            "loader_share": sum(row["loader_share"] for row in self.rows) / len(self.rows),
            "parameters": sum(p.numel() for p in self.job.model.parameters()),
            "kernel_structure": kernel_structure(self.job.model),
            "precision": self.config.precision,
            "device": self.job.device.type,
            "kernels": self.job.kernels,
            **({"augmentation": self.job.augmentation} if self.job.augmentation else {}),
            "processes": world_size(),
            "threads": torch.get_num_threads(),
            **({"stopped_early": True} if self._lost_patience() else {}),
            **({"max_time_share": self._seconds() / self.budget.seconds} if self.budget else {}),
            **({"data_changed_in_epochs": self.data_changed} if self.data_changed else {}),
        }

    def _write_results(self, results: dict[str, Any], model: nn.Module, found: Scores | None) -> None:
        if self.config.draw:
            drawn, classes = self.folder.pictures, self.job.data.classes
            gallery.results(drawn, self.rows, self.steps.rows, model, found, classes)
            split = "test" if results["test_n"] else "val"
            gallery.mistakes(self.job.data, split, found, self.folder.mistakes)
        card = model_card(self.contents, results, self.folder.mistakes.exists())
        write_atomic(self.folder.card, card.encode(errors="replace"))  # class names may not be valid text
        results["seconds"] = self._seconds()
        if self.budget:
            results["max_time_share"] = results["seconds"] / self.budget.seconds
            self.console.print(f"time     {results['seconds']:.0f} s, {results['max_time_share']:.1%} of max_time")
        record = records.RunRecord(
            name=self.folder.path.name,
            command=self.contents["command"],
            config=to_dict(self.config),
            data=self.contents["data"],
            results=results,
            seed=self.config.seed,
        )
        self.folder.log("end", self.module.steps_done, results)
        last = {key: results[key] for key in ("test_top1", "test_top5", "test_loss")}
        for logger in self._loggers:
            logger.add_row({"step": self.module.steps_done, **last})
        records.write(self.folder.record, record)  # last, because its presence marks the run as finished
        self._finished = True

    def _seconds(self) -> float:
        return self.seconds_before + time.time() - self.started


def _rank(row: dict[str, Any]) -> tuple[float, float]:
    return row["top1"], -row["val_loss"]


def summary(folder: RunFiles, results: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `train` and `resume` return, from the results in a record."""
    keys = ("val_top1", "test_top1", "epochs", "seconds", "images_per_second")
    return {"run": str(folder.path)} | {key: results[key] for key in keys}
