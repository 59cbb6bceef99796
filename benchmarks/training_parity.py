"""Training with and without the kernels from one seed on the same batches: do the loss curves agree?

    python benchmarks/training_parity.py cifar10 --precision fp32

ConvMixer-256/8 p2 k5 with the settings of `authors-cifar10`, 300 steps of 64 images, three times: kernels, plain
PyTorch, and plain PyTorch on one thread, whose sums have another order. Training amplifies every rounding, so two
plain runs drift apart as well: their distance is what the kernels' is judged by. fp32 must also agree within 1e-4
over the first 10 steps. Appends to records/training_parity.jsonl and draws records/training_parity_<precision>.png.
Expect about 20 minutes on 2 cores. bf16 without bf16 instructions takes plain PyTorch four times as long.
"""

import argparse
import dataclasses
import statistics
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from convmixer import records
from convmixer.config import Config, to_dict
from convmixer.models.convmixer import ConvMixer
from convmixer.recipes import load_recipe
from convmixer.train.engine import fit
from convmixer.train.progress import Progress
from convmixer.train.setup import prepare

FIRST, WINDOW = 10, 20  # steps


def losses(data: str, config: Config, steps: int, kernels: bool, threads: int) -> list[float]:
    """Return the loss of every step."""
    from rich.console import Console

    torch.set_num_threads(threads)
    job = prepare(data, config)
    if job.kernels != "CPU kernels":
        raise SystemExit("the kernels are not built: `convmixer info` says why")
    if not kernels:
        job.model.__class__ = ConvMixer
    module = job.module(1)  # the learning rate of a run of one epoch: its highest comes near step 300
    found: list[float] = []

    with Progress(Console(), steps, config.batch_size) as bar:

        def after_step() -> bool:
            found.append(float(module.loss_sum) - sum(found))
            bar.update(module.steps_done)
            return False

        fit(module, job.train_loader(workers=0), steps, after_step)
    return found


def compare(ours: list[float], plain: list[float], other: list[float]) -> dict[str, float]:
    """Return how far the kernels' losses are from a plain run's, beside how far two plain runs are apart."""
    results = {}
    for name, values in (("kernels", ours), ("one_thread", other)):
        pairs = list(zip(values, plain, strict=True))
        results[f"{name}_largest_relative_difference_first_10"] = max(abs(a / b - 1) for a, b in pairs[:FIRST])
        results[f"{name}_mean_difference"] = statistics.fmean(abs(a - b) for a, b in pairs)
    for name, values in (("kernels", ours), ("plain", plain), ("one_thread", other)):
        results[f"{name}_mean_of_last_20"] = statistics.fmean(values[-WINDOW:])
    return results


def draw(curves: dict[str, list[float]], path: Path) -> None:
    """Draw the losses, and their distances from the plain run."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, layout="constrained")
    reference = curves["plain PyTorch"]
    for (name, values), style in zip(curves.items(), ("-", "--", ":"), strict=True):
        above.plot(values, style, label=name, linewidth=1.2)
        if values is not reference:
            distance = [max(abs(a - b), 1e-9) for a, b in zip(values, reference, strict=True)]
            below.plot(distance, style, label=f"{name}, from plain PyTorch", linewidth=1.2)
    above.set(ylabel="training loss", title=f"The same {len(reference)} batches from the same weights")
    below.set(ylabel="distance", xlabel="step", yscale="log")
    for axes in (above, below):
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train three times, record, draw, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    config = dataclasses.replace(
        load_recipe("authors-cifar10"), precision=args.precision, batch_size=args.batch_size, seed=args.seed
    )
    threads = torch.get_num_threads()
    curves = {}
    for name, kernels, count in (
        ("kernels", True, threads),
        ("plain PyTorch", False, threads),
        ("plain PyTorch, one thread", False, 1),
    ):
        print(name)
        curves[name] = losses(args.data, config, args.steps, kernels, count)
    results = compare(*curves.values())
    folder = Path(__file__).parent / "records"
    record = records.RunRecord(
        f"training-parity-{args.precision}",
        records.command_line(),
        to_dict(config) | {"steps": args.steps, "threads": threads},
        {"spec": args.data},
        results | {"losses": curves},
        args.seed,
    )
    records.append(folder / "training_parity.jsonl", record)
    draw(curves, folder / f"training_parity_{args.precision}.png")
    for name, value in results.items():
        print(f"{name:<44} {value:.3g}")
    if args.precision == "fp32" and results["kernels_largest_relative_difference_first_10"] > 1e-4:
        raise SystemExit("the kernels' losses differ by more than 1e-4 over the first 10 steps")


if __name__ == "__main__":
    main()
