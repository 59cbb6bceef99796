"""Write the tables of docs/speed.md and the README: the CPU benchmark by level of the processor, from the records.

    python tools/speed.py

Reads benchmarks/records/ and takes the newest record of each row and processor. The same records give the same pages.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "benchmarks" / "records"
PAGE = ROOT / "docs" / "speed.md"
README = ROOT / "README.md"
LEVELS = {  # processor of a record: its instructions, and the machine
    "AMD EPYC family 25 model 1": "AVX2 (AMD EPYC, Zen 3)",
    "AMD EPYC family 26 model 2": "AVX-512, VNNI, BF16 (AMD EPYC, Zen 5)",
    "Intel(R) Xeon(R) Processor family 6 model 167": "AMX (Intel Xeon)",
}
OTHERS = {  # how the page calls the fastest other
    "eager": "eager PyTorch",
    "compile": "torch.compile",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
}
NOT_MEASURED = "not measured"
Row = tuple[int, int, int, int, int, int, str]
"""Image size, width, depth, patch size, kernel size, batch size and precision: a row, in the order of the table."""
SHORT: tuple[tuple[str, Row], ...] = (  # the README's rows
    ("infer", (32, 256, 8, 2, 5, 16, "bf16")),
    ("infer", (224, 768, 32, 7, 7, 16, "bf16")),
    ("infer", (224, 768, 32, 7, 7, 1, "int8")),
    ("train", (32, 256, 8, 2, 5, 64, "bf16")),
    ("train", (32, 256, 8, 1, 9, 64, "bf16")),
)


def newest(task: str) -> dict[Row, dict[str, dict[str, Any]]]:
    """Return the newest record of each row and level, `task` being "train" or "infer"; smaller images come first."""
    found: dict[Row, dict[str, dict[str, Any]]] = {}
    for path in sorted(RECORDS.glob(f"{task}_*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line) | {"file": path.name}
            level = LEVELS[record["environment"]["processor"]]
            columns = found.setdefault(_row(record["results"]), {})
            columns[level] = max(columns.get(level, record), record, key=lambda r: str(r["date"]))
    return dict(sorted(found.items()))


def _row(results: dict[str, Any]) -> Row:
    names = ("img_size", "dim", "depth", "patch_size", "kernel_size", "batch_size")
    sizes = tuple(results[name] for name in names)
    return (*sizes, results["precision"])


def tables(task: str) -> str:
    """Return the table of a task, with one column for each level."""
    found = newest(task)
    rows = [(_name(row), *(_cell(columns.get(level)) for level in LEVELS.values())) for row, columns in found.items()]
    return _table("images per second", rows)


def _table(head: str, rows: Sequence[Sequence[str]]) -> str:
    lines = [(head, *LEVELS.values()), ("---",) * (1 + len(LEVELS)), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def short_table() -> str:
    """Return the README's table."""
    found = {task: newest(task) for task in ("infer", "train")}
    rows = []
    for task, row in SHORT:
        cells = (_short_cell(found[task][row].get(level)) for level in LEVELS.values())
        rows.append((f"{'inference' if task == 'infer' else 'training'}, {_name(row).partition('-')[2]}", *cells))
    return _table("images per second", rows)


def _short_cell(record: dict[str, Any] | None) -> str:
    if record is None:
        return NOT_MEASURED
    results = record["results"]
    speed = _speed(results["ours"]["images_per_second"])
    return f"{speed}, [{results['ratio']:.2f}x](benchmarks/records/{record['file']})"


def _name(row: Row) -> str:
    size, dim, depth, patch, kernel, batch, precision = row
    return f"ConvMixer-{dim}/{depth} p{patch} k{kernel}, {size} px, batch {batch}, {precision}"


def _cell(record: dict[str, Any] | None) -> str:
    if record is None:
        return NOT_MEASURED
    results = record["results"]
    other = results["peers"][results["best_peer"]]["images_per_second"]
    words = results["best_peer"].split("-")
    theirs = OTHERS[words[0]] if words[1] == results["precision"] else f"{OTHERS[words[0]]}, {words[1]}"
    compiled, left_out = ("compile" in " ".join(results[key]) for key in ("peers", "left_out"))
    missing = ", torch.compile not measured" if left_out and not compiled else ""
    memory = f", {results['peak_memory_ratio']:.2f} of the memory" if results.get("peak_memory_ratio") else ""
    return (
        f"**{_speed(results['ours']['images_per_second'])}** against {_speed(other)} ({theirs}): "
        f"[{results['ratio']:.2f}x](../benchmarks/records/{record['file']}), "
        f"{results['share_of_bound']:.0%} of the bound{memory}{missing}"
    )


def _speed(images_per_second: float) -> str:
    return f"{images_per_second:,.0f}" if images_per_second >= 100 else f"{images_per_second:.3g}"


def with_table(text: str, name: str, content: str) -> str:
    """Return a page with the table between the markers of a name made again."""
    begin, end = f"<!-- {name}: written by tools/speed.py -->", f"<!-- {name}: end -->"
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def pages() -> dict[Path, str]:
    """Return the text of each page with its tables made again."""
    page = PAGE.read_text(encoding="utf-8")
    for task in ("infer", "train"):
        page = with_table(page, task, tables(task))
    return {PAGE: page, README: with_table(README.read_text(encoding="utf-8"), "speed", short_table())}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path}")
