"""Train: settings in, run folder out; and resume, which continues a run as if it had never stopped."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from convmixer.config import Config, override
from convmixer.device import choose_device
from convmixer.errors import RequestError
from convmixer.files import remove_leftovers
from convmixer.preprocess import Preprocessing
<<<<<<< HEAD
from convmixer.run_folder import is_run
from convmixer.train.budget import length_of
from convmixer.train.checkpoint import load_checkpoint
from convmixer.train.distributed import on_first, process_group, rank
from convmixer.train.folder import RunFiles, check_empty, describe
from convmixer.train.lock import RunLock
from convmixer.train.session import Run, summary
from convmixer.train.setup import Build, prepare
=======
from convmixer.run_folder import BEST, LAST
from convmixer.seal import make_seal
from convmixer.text import terminal
from convmixer.train import gallery
from convmixer.train.checkpoint import load_checkpoint, save_checkpoint
from convmixer.train.distributed import (
    any_process,
    average_statistics,
    copy_from_first,
    from_first,
    process_group,
    rank,
    sum_over_processes,
    world_size,
)
from convmixer.train.engine import StopSignals, fit, measure_speed
from convmixer.train.folder import Board, RunFiles, check_empty, describe, model_card
from convmixer.train.module import TrainingModule
from convmixer.train.progress import Progress
from convmixer.train.scores import Scores, score
from convmixer.train.setup import Build, Job, prepare

FINISH_SECONDS = 10.0  # kept of a time budget for the pictures and the last files
ASK_EVERY = 16  # steps between the moments at which several processes agree to save or stop
>>>>>>> ac4b829 (text: names of strangers are escaped for where they are shown)


def train(
    data: str,
    config: Config,
    out: Path | None = None,
    recipe: Config | None = None,
    recipe_name: str | None = None,
    build: Build | None = None,
) -> dict[str, Any]:
    """Train a model and return the result; everything about it is in the run folder.

    Args:
        data: The data argument.
        config: Resolved settings.
        out: New or empty folder; None: the next free `runs/<recipe>-<number>`.
        recipe: The recipe's settings, to say what differs; None: the defaults.
        recipe_name: Its name.
        build: Name and arguments for `create_model`, instead of `config.model`.

    Returns:
        `run` (the folder), `val_top1`, `test_top1` (percent, None without such a split), `epochs`, `seconds`,
        `images_per_second`.

    Raises:
        RequestError: The settings, the data or the folder do not allow it.
        SystemExit: 143 after SIGTERM, 130 after Ctrl-C; a checkpoint is saved then.
    """
    if out is not None and _restarted_by_torchrun() and is_run(out):
        return resume(out)
    started = time.time()
    with _processes(config):
        if out is not None and rank() == 0:
            check_empty(out)  # at once, and again below: what is refused leaves no folder
        job = prepare(data, config, build)
        epochs, steps = length_of(job, started)
        name = recipe_name or data.rstrip("/").rpartition("/")[2]
        folder = on_first(lambda: RunFiles.create(out, name))
        schedule = {"epochs": epochs, "steps": steps, "steps_per_epoch": job.steps_per_epoch}
        contents = describe(
            job.config, config, recipe, recipe_name, job.spec, job.data, job.preprocessing, job.build, schedule
        )
        with _alone(folder) as lock:
            on_first(lambda: check_empty(folder.path))  # another process may have trained there since
            run = Run(job, folder, contents, started, lock)
            run.begin()
            return run.to_the_end()


def resume(
    path: Path, data: str | None = None, device: str | None = None, max_bad_fraction: float | None = None
) -> dict[str, Any]:
    """Continue a run from its newest checkpoint and return the result, as `train` does.

    On the same machine the weights end up as without the stop, bit for bit. A finished run is not touched: its result
    is returned. Damaged checkpoints are named, and the newest intact one is used.

    Args:
        path: The run folder.
        data: Where its data are here; None: where they were.
        device: Where to compute; None: where it was.
        max_bad_fraction: Share of unreadable images from now on; None: as it was.

    Raises:
        RequestError: The folder is no run, another process trains in it, its data have changed, or no checkpoint can
            be read.
    """
    folder = RunFiles(path)
    contents = folder.read_config()
    if results := folder.read_results():
        print(f"{path} is finished already")
        return summary(folder, results)
    if max_bad_fraction is not None:
        contents["settings"]["max_bad_fraction"] = max_bad_fraction
    config = override(Config(), contents["settings"] | ({"device": device} if device else {}))
    with _processes(config), _alone(folder) as lock:
        if max_bad_fraction is not None and rank() == 0:
            folder.write_config(contents)
        state = load_checkpoint(folder.checkpoints)
        build = (contents["build"]["name"], contents["build"]["arguments"])
        known = Preprocessing(**contents["preprocessing"]) if state else None
        job = prepare(data or contents["data"]["spec"], config, build, known, recorded=data is None)
        if job.data.checksum != contents["data"]["checksum"]:
            raise RequestError(f"the data of {path} have changed since it began: start a new run")
        run = Run(job, folder, contents, time.time(), lock)
        run.restore(state)
        return run.to_the_end()


<<<<<<< HEAD
def _processes(config: Config) -> contextlib.AbstractContextManager[None]:
=======
class Run:
    """A run under way.

    Args:
        job: What is trained.
        folder: Where it goes.
        contents: Of config.yaml.
        started: When this session began, seconds since 1970.
    """

    def __init__(self, job: Job, folder: RunFiles, contents: dict[str, Any], started: float) -> None:
        self.job, self.folder, self.contents, self.started = job, folder, contents, started
        self.config, self.schedule = job.config, contents["schedule"]
        self.total_steps, self.steps_per_epoch = self.schedule["steps"], job.steps_per_epoch
        self.module: TrainingModule = job.module(self.schedule["epochs"])
        self.console = Console(quiet=rank() != 0, soft_wrap=True, highlight=False, markup=False)
        self.rows: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {}
        self.seconds_before = 0.0  # of earlier sessions
        self.training_seconds, self.trained_images = 0.0, 0
        self.signals = StopSignals()
        self.budget = parse_seconds(self.config.max_time) - FINISH_SECONDS if self.config.max_time else math.inf
        self._val_loader = job.eval_loader("val")
        self._saved_at = time.monotonic()
        self._out_of_time = self._told_to_stop = False
        self._board = Board(folder.tensorboard)

    @property
    def writes(self) -> bool:
        """Whether this process writes the files."""
        return rank() == 0

    def begin(self) -> None:
        """Write and show everything that is decided, before the first step."""
        self._say_settings()
        if self.writes:
            self.folder.write_config(self.contents)
            self.folder.write_metrics([])
            self.folder.log("start", 0, {"command": self.contents["command"]})
            gallery.augmented(self.job, self.folder.pictures / "augmented.png")
            gallery.samples(self.job.data, self.folder.samples)

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go back to a checkpoint; to the beginning where there is none."""
        if state:
            self.module.restore(state["module"])
            self.rows, self.best, self.seconds_before = state["rows"], state["best"], state["seconds"]
            self.training_seconds, self.trained_images = state["training_seconds"], state["trained_images"]
        step = self.module.steps_done
        self.console.print(f"resuming {terminal(self.folder.path)} at step {step} of {self.total_steps}")
        if self.writes:
            self.folder.rewind_log(step)
            self.folder.write_metrics(self.rows)
            self._board.rewind(step)
            self.folder.log("resume", step, {"command": records.command_line()})

    def to_the_end(self) -> dict[str, Any]:
        """Train what is left, measure the chosen weights, and return the result."""
        left = self.total_steps - self.module.steps_done
        with self.signals, Progress(self.console, self.total_steps, self.job.batch_size) as self.bar:
            if left > 0:
                self.loader = self.job.train_loader(self.module.steps_done)
                self._new_epoch()
                try:
                    fit(self.module, self.loader, left, self._after_step)
                except RuntimeError:  # the loader's workers were told too (systemd, SLURM) and ended in mid-step
                    if self.signals.received is None:
                        raise
                    self._exit("stopped; from the last checkpoint")
            if self._told_to_stop and self.module.steps_done < self.total_steps:
                self._exit("stopped and saved;")
        return self._finish()

    # After each step

    def _after_step(self) -> bool:
        """Do what is due after a step; True ends the training."""
        done = self.module.steps_done
        self.bar.update(done)
        ends_epoch = done % self.steps_per_epoch == 0 or done == self.total_steps
        if ends_epoch:
            self._end_epoch()
        stop = self._wants_to_stop(ends_epoch)
        if self._out_of_time and not ends_epoch:
            self._end_epoch()
            ends_epoch = True
        if ends_epoch or stop or self._checkpoint_is_due():
            self._save_checkpoint()
        if ends_epoch:
            self._new_epoch()
        return stop

    def _wants_to_stop(self, ends_epoch: bool) -> bool:
        if world_size() > 1 and not ends_epoch and self.module.steps_done % ASK_EVERY:
            return False
        self._out_of_time = any_process(self._seconds() > self.budget, self.job.device)
        self._told_to_stop = any_process(self.signals.received is not None, self.job.device)
        return self._out_of_time or self._told_to_stop

    def _checkpoint_is_due(self) -> bool:
        # only the first process writes, so the others need not know
        return self.writes and time.monotonic() - self._saved_at > self.config.checkpoint_seconds

    def _save_checkpoint(self) -> None:
        if self.writes:
            self._check_finite(float(self.module.loss_sum))  # what cannot go on must not replace what can
            state = {
                "module": self.module.state(),
                "rows": self.rows,
                "best": self.best,
                "seconds": self._seconds(),
                "training_seconds": self.training_seconds,
                "trained_images": self.trained_images,
            }
            save_checkpoint(self.folder.checkpoints, state)
            self._saved_at = time.monotonic()

    def _check_finite(self, loss: float) -> None:
        """Raise where the loss is not finite, or the weights: the last update comes after the last loss."""
        if not math.isfinite(loss):
            what = f"the training loss is {loss} at step {self.module.steps_done}"
        elif not all(torch.isfinite(p).all() for p in self.module.model.parameters()):
            what = f"weights are not finite after step {self.module.steps_done}"
        else:
            return
        raise FloatingPointError(
            f"{what}: lower lr (now {self.config.lr:g}), raise eps or set clip_norm; the checkpoint before is kept"
        )

    def _exit(self, how: str) -> NoReturn:
        number = self.signals.received or signal.SIGTERM  # the signal may have been another process's
        if self.writes:
            self.folder.log("stopped", self.module.steps_done, {"signal": number})
        self.console.print(f"{how} continue with: convmixer train --resume {terminal(self.folder.path)}")
        raise SystemExit(128 + number)

    # At the end of an epoch

    def _new_epoch(self) -> None:
        self._epoch_began, self._epoch_first = time.perf_counter(), self.module.steps_done
        self.loader.waited_seconds = 0.0

    def _end_epoch(self) -> None:
        row = self._measure_epoch()
        self.rows.append(row)
        better = not self.best or self._val_loader is None or _rank(row) > _rank(self.best)
        if better:
            self.best = row
        self.console.print(_line(row, self.schedule["epochs"], better and self._val_loader is not None))
        if self.writes:
            self._save_weights(LAST, row)
            if better:
                self._save_weights(BEST, row)
            self.folder.write_metrics(self.rows)
            kernels = kernel_growth(self.module.evaluated)
            self.folder.log("epoch", self.module.steps_done, {**row, "kernels": kernels})
            self._board.add_row(row)

    def _measure_epoch(self) -> dict[str, Any]:
        module, done = self.module, self.module.steps_done
        seconds = time.perf_counter() - self._epoch_began
        images = (done - self._epoch_first) * self.job.batch_size
        self.training_seconds += seconds
        self.trained_images += images
        steps = (done - 1) % self.steps_per_epoch + 1
        train_loss = float(sum_over_processes(module.loss_sum.clone())) / (steps * world_size())
        module.loss_sum.zero_()
        self._check_finite(train_loss)
        average_statistics(module.model)
        copy_from_first(module.evaluated)  # a moving average's statistics: a checkpoint holds the first process's
        found = self._score(self._val_loader)
        return {
            "epoch": round(done / self.steps_per_epoch, 6),
            "step": done,
            "lr": module.optimizer.param_groups[0]["lr"],
            "train_loss": train_loss,
            "val_loss": found and found.loss,
            "top1": found and found.top1,
            "top5": found and found.top5,
            "images_per_second": images / seconds,
            "loader_share": self.loader.waited_seconds / seconds,
            "seconds": self._seconds(),
        }

    def _score(self, loader: Any) -> Scores | None:
        if loader is None:
            return None
        classes = len(self.job.data.classes)
        return score(self.module.evaluated, loader, classes, self.job.device, self.module.autocast)

    def _save_weights(self, which: str, row: dict[str, Any]) -> None:
        c, (name, args) = self.config, self.job.build
        save_model(
            self.folder.weights(which),
            self.module.evaluated,
            architecture=name,
            model_args=args,
            classes=self.job.data.classes,
            preprocessing=self.job.preprocessing,
            data={
                "spec": self.job.spec,
                "seal": make_seal(self.job.spec),
                "checksum": self.job.data.checksum,
                "val_fraction": c.val_fraction,
                "seed": c.seed,
                "max_bad_fraction": c.max_bad_fraction,
                "img_size": c.img_size,
                "options": self.job.data.options.given(),
            },
            recipe=self.contents["recipe"],
            epoch=row["epoch"],
            val_top1=row["top1"],
        )

    # At the end

    def _finish(self) -> dict[str, Any]:
        if self.writes:
            best = load_model(self.folder.weights(BEST)).model
            self.module.evaluated.load_state_dict(best.state_dict())
        copy_from_first(self.module.evaluated)
        test = self._score(self.job.eval_loader("test"))
        val = self._score(self._val_loader)
        results = self._results(val, test)
        self._say_results(results)
        if self.writes:
            self._write_results(results, test or val)
        return _summary(self.folder, results)

    def _results(self, val: Scores | None, test: Scores | None) -> dict[str, Any]:
        chosen = "the last epoch, nothing is held out"
        if self._val_loader is not None:
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
            "parameters": sum(p.numel() for p in self.module.model.parameters()),
            "precision": self.config.precision,
            "device": self.job.device.type,
            "kernels": self.job.kernels,
            "processes": world_size(),
            "threads": torch.get_num_threads(),
        }

    def _write_results(self, results: dict[str, Any], found: Scores | None) -> None:
        gallery.results(self.folder.pictures, self.rows, self.module.evaluated, found, self.job.data.classes)
        card = model_card(self.contents, results)
        write_atomic(self.folder.card, card.encode(errors="replace"))  # names of classes
        results["seconds"] = self._seconds()
        record = records.RunRecord(
            name=self.folder.path.name,
            command=self.contents["command"],
            config=to_dict(self.config),
            data=self.contents["data"],
            results=results,
            seed=self.config.seed,
        )
        self.folder.log("end", self.module.steps_done, results)
        self._board.close()
        records.append(self.folder.record, record)  # last: its presence says that the run is finished

    # What is said

    def _say_settings(self) -> None:
        data, c = self.job.data, self.config
        self.console.print(f"run      {terminal(self.folder.path)}")
        self.console.print(f"recipe   {self.contents['recipe'] or 'none'}")
        for note in data.notes:
            self.console.print(f"data     {terminal(data.name)}: {terminal(note)}")
        parameters = sum(p.numel() for p in self.module.model.parameters())
        self.console.print(f"model    {self.job.build[0]}, {parameters:,} parameters, {self.job.kernels}")
        self.console.print(f"compute  {c.device}, {c.precision}, {torch.get_num_threads()} threads x {world_size()}")
        settings = "  ".join(f"{name}={_show(value)}" for name, value in to_dict(c).items())
        for line in textwrap.wrap(settings, 106):
            self.console.print(f"settings {terminal(line)}")
        for name, change in self.contents["differs_from_recipe"].items():
            self.console.print(f"differs  {name}: {_show(change['here'])} (recipe: {_show(change['recipe'])})")
        if self.job.batch_size != c.batch_size:
            self.console.print(f"batch    {self.job.batch_size}, all the training images there are")

    def _say_results(self, results: dict[str, Any]) -> None:
        self.console.print(f"chosen   {results['chosen']}")
        for split, use in (("val", "chose the epoch"), ("test", "read once, now")):
            if results[f"{split}_n"]:
                top1, top5, n = (results[f"{split}_{key}"] for key in ("top1", "top5", "n"))
                self.console.print(f"{split:<8} top-1 {top1:.2f}%  top-5 {top5:.2f}%  of {n} images ({use})")
        self.console.print(f"files    {terminal(self.folder.path)}, pictures in {terminal(self.folder.pictures)}")

    def _seconds(self) -> float:
        return self.seconds_before + time.time() - self.started


def _processes(config: Config) -> Any:
    from convmixer.device import choose_device

>>>>>>> ac4b829 (text: names of strangers are escaped for where they are shown)
    return process_group(choose_device(config.device))


@contextlib.contextmanager
def _alone(folder: RunFiles) -> Iterator[RunLock | None]:
    """Hold the run folder's lock in the first process; the others get None, and the refusal too."""
    lock = RunLock(folder.lock) if rank() == 0 else None

    def enter() -> None:
        assert lock is not None
        lock.__enter__()
        remove_leftovers(folder.path)

    on_first(enter)
    try:
        yield lock
    finally:
        if lock is not None:
            lock.__exit__(None, None, None)


def _restarted_by_torchrun() -> bool:
    """Return whether torchrun started these processes again after one of them died: the command is the same then."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
