"""Checks whether a recorded accuracy still holds: finds its weights and data, and measures it again."""

from pathlib import Path
from typing import Any

from convmixer import records
from convmixer.config import Config, override
from convmixer.data.datasets import load_data
from convmixer.data.loader import eval_loader
from convmixer.data.options import Options
from convmixer.data.transforms import eval_transform
from convmixer.device import choose_device, choose_precision
from convmixer.errors import Failed, RequestError
from convmixer.evaluation.metrics import evaluate
from convmixer.fast import accelerate, has_kernels
from convmixer.models.weights import load_model
from convmixer.run_folder import BEST, RunFolder

# percentage points: other processors and kernels round differently, and change the class of images near the boundary
TOLERANCE = 0.1


def verify(path: Path, data: str | None = None, run: str | None = None) -> dict[str, Any]:
    """Measure recorded test accuracies again, and return whether each still holds.

    Args:
        path: The record of a run or the records of a study; the weights are in the same folder.
        data: The data argument on this machine; None: the recorded one.
        run: Name of the only record to verify; None: all records.

    Returns:
        `holds`, whether all records hold, and `records`: for each the name, recorded, measured, difference and holds.

    Raises:
        RequestError: There is no such record, its weights are missing, or the data are not the recorded ones.
        RuntimeError: An accuracy does not hold.
    """
    try:
        found = [record for record in records.read(path) if run in (None, record.name)]
    except (OSError, ValueError) as error:
        raise RequestError(f"cannot read {path}: {error}") from error
    if not found:
        raise RequestError(f"{path} has no record{f' named {run}' if run else ''}")
    results = [_verify(path.parent, record, data) for record in found]
    for r in results:
        sign = "holds" if r["holds"] else "DOES NOT HOLD"
        print(f"{r['name']}: recorded {r['recorded']:.2f}%, measured {r['measured']:.2f}%: {sign}")
    wrong = [r["name"] for r in results if not r["holds"]]
    if wrong:
        raise Failed(f"{len(wrong)} of {len(results)} recorded numbers do not hold: {', '.join(wrong)}")
    return {"holds": True, "records": results}


def _verify(folder: Path, record: records.RunRecord, data: str | None) -> dict[str, Any]:
    recorded = record.results.get("test_top1")
    if recorded is None:
        raise RequestError(f"{record.name} records no test accuracy")
    weights = folder / str(record.results.get("weights") or RunFolder("").weights(BEST))
    if not weights.exists():
        raise RequestError(f"the weights of {record.name} are not at {weights}: they are needed to verify it")
    config = override(Config(), record.config)
    splits = load_data(
        data or record.data["spec"],
        val_fraction=config.val_fraction,
        test_fraction=config.test_fraction,
        seed=config.seed,
        max_bad_fraction=config.max_bad_fraction,
        img_size=config.img_size,
        recorded=data is None,
        options=Options.of(config),
    )
    if splits.checksum != record.data["checksum"] or not splits.test:
        raise RequestError(f"{data or record.data['spec']} does not hold the data that {record.name} was measured on")
    loaded, device = load_model(weights), choose_device("auto")
    loader = eval_loader(splits.test, eval_transform(loaded.preprocessing), 128, 0)
    precision = choose_precision(config.precision, device)
    model = loaded.model.to(device)
    model = accelerate(model) if has_kernels(device, precision) else model
    measured = evaluate(model, loader, device, precision)["top1"]
    difference = measured - recorded
    return {
        "name": record.name,
        "recorded": recorded,
        "measured": measured,
        "difference": difference,
        "holds": abs(difference) <= TOLERANCE + 1e-9,
    }
