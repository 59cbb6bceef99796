"""Compile every CUDA kernel for cards that are not here, and print registers, spills and shared memory.

    python tools/cuda_resources.py [--quick] [--write docs/log.md]
    python tools/cuda_resources.py --here        # for the card in this machine, in parallel, into Triton's cache

Needs no GPU: the kernels are launched on shapes alone (meta tensors), each launch is written down and compiled for
compute capability 8.0, 9.0 and 12.0. Exits with 1 if a kernel spills or needs more shared memory than a card has.
Takes about half an hour on two cores. `--here` compiles for everything that `benchmarks/gpu.py` measures, on all
cores, because a first step compiles its kernels one after the other.
"""

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from convmixer.kernels.cuda import depthwise, product, rows, sums

CARDS = {80: 163 * 1024, 90: 227 * 1024, 120: 99 * 1024}  # shared memory that one program may have
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
# name: dim, kernel size, positions on a side, batch
NETWORKS = {
    "256/8 p2 k5": (256, 5, 16, 512),
    "256/8 p1 k9": (256, 9, 32, 256),
    "768/32": (768, 7, 32, 64),
    "1536/20": (1536, 9, 32, 64),
}
# of the benchmark's other stages: networks, batches and dtypes
ALSO = [
    ((64, 5, 16, 128), torch.bfloat16),
    ((64, 5, 16, 128), torch.float32),
    ((64, 5, 8, 64), torch.bfloat16),
    *(((*NETWORKS[name][:3], batch), torch.bfloat16) for name in ("768/32", "1536/20") for batch in (1, 16, 256)),
    ((256, 5, 16, 256), torch.bfloat16),
    ((256, 5, 16, 16), torch.bfloat16),
]
Launch = tuple[JITFunction, dict[str, Any], dict[str, Any]]
MARKS = "<!-- registers: made by tools/cuda_resources.py -->", "<!-- end of registers -->"


def launches_of(dim: int, k: int, side: int, batch: int, dtype: torch.dtype, act: int = 0) -> list[Launch]:
    """Return each launch of a block, of its ends and of inference: kernel, arguments by name, options."""
    found: list[Launch] = []

    def note(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
        found.append((kernel, dict(zip(kernel.arg_names, args, strict=False)) | kwargs, options))

    run, JITFunction.run = JITFunction.run, note
    try:
        _launch_all(dim, k, side, batch, dtype, act)
    finally:
        JITFunction.run = run
    for _, arguments, _ in found:
        if "WIDEN" in arguments:
            arguments["WIDEN"] = False
    return found


def _launch_all(dim: int, k: int, side: int, batch: int, dtype: torch.dtype, act: int) -> None:
    with torch.device("meta"):
        v = torch.empty(batch, side, side, dim, dtype=dtype)
        taps, vector, coefficients = torch.empty(k * k, dim), torch.empty(dim), torch.empty(3, dim)
        matrix, statistics = torch.empty(dim, dim, dtype=dtype), torch.empty(2, dim, dtype=torch.float64)
        norm = sums.Norm(vector, vector, 1e-5, batch * side * side)
        parts = rows.statistics(v, act)
        sums.scale_shift(parts, norm, statistics)
        sums.gradients(parts, norm, statistics, True)
        sums.total(depthwise.weight_gradient(v, v, k))
        rows.products(v, v, act)
        rows.act_norm(v, coefficients, act)
        rows.act_norm_backward(v, v, coefficients, v, act)
        rows.operands(v, v, coefficients, v, coefficients, v, coefficients, act)
        rows.pool(v, coefficients, act)
        rows.pool_backward(torch.empty(batch, dim), v, act)
        depthwise.forward(v, taps, vector, act)
        depthwise.forward_norm(v, taps, vector, coefficients, act)
        depthwise.input_gradient(v, v, v, taps, act)
        product.forward(v, coefficients, v, matrix, vector, act)
        product.forward_norm(v, matrix, vector, coefficients, act)
        product.input_gradient(v, matrix, v, v, act)


def source_of(launch: Launch) -> tuple[ASTSource, dict[str, Any]]:
    """Return what Triton compiles for a launch, and with which options."""
    kernel, arguments, options = launch
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes), options


def compile_for(launch: Launch, capability: int) -> dict[str, int]:
    """Return registers, spilled bytes and shared memory of a launch's kernel on a card."""
    source, options = source_of(launch)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return _usage(compiled.asm["cubin"]) | {"shared": compiled.metadata.shared}


def _usage(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", said.stdout)[-1]
    return {"registers": int(registers), "spilled": int(stack), "code": len(cubin)}


def _key(launch: Launch) -> str:
    kernel, arguments, options = launch
    chosen = {p.name: arguments[p.name] for p in kernel.params if p.is_constexpr}
    return kernel.__name__.strip("_") + "".join(
        f" {name}={value}" for name, value in sorted((chosen | options).items()) if name not in ("POLYNOMIAL", "ACT")
    )


def table(networks: dict[str, tuple[int, int, int, int]], dtypes: list[torch.dtype]) -> list[dict[str, Any]]:
    """Compile and return one row for each kernel as these networks use it; equal ones once."""
    found: dict[str, dict[str, Any]] = {}
    for name, shape in networks.items():
        for dtype in dtypes:
            for launch in launches_of(*shape, dtype):
                key = f"{TYPES[dtype]} {_key(launch)}"
                if key in found:
                    continue
                start = time.perf_counter()
                found[key] = {"kernel": key, "name": _name(launch), "dtype": TYPES[dtype], "network": name}
                for capability in CARDS:
                    found[key][f"sm_{capability}"] = compile_for(launch, capability)
                cells = [
                    " ".join(str(found[key][f"sm_{n}"][w]) for w in ("registers", "spilled", "shared")) for n in CARDS
                ]
                print(f"{key}: {'; '.join(cells)} ({time.perf_counter() - start:.0f} s)", flush=True)
    return list(found.values())


def _name(launch: Launch) -> str:
    """Return a kernel's name with what changes it most: its mode and the kernel size."""
    kernel, arguments, _ = launch
    words = [kernel.__name__.strip("_").removesuffix("_kernel")]
    words += [arguments["MODE"]] if "MODE" in arguments else []
    words += ["fused"] if arguments.get("RESIDUAL") else []
    words += [f"k={arguments['K']}"] if "K" in arguments else []
    return " ".join(words)


def markdown(found: list[dict[str, Any]], quick: bool) -> str:
    """Return the table: of each kernel and dtype the most over the networks, one number per card."""
    networks = ", ".join({row["network"]: 0 for row in found})
    lines = [
        f"`python tools/cuda_resources.py{' --quick' if quick else ''}` (triton {triton.__version__}): registers for "
        f"{', '.join(f'sm_{n}' for n in CARDS)}; most shared",
        f"memory in KiB; bytes spilled. Each number is the maximum over {networks}.",
        "",
        "| kernel | bf16 | fp32 |",
        "|---|---|---|",
    ]
    for name in dict.fromkeys(row["name"] for row in found):
        cells = []
        for dtype in ("bf16", "fp32"):
            rows = [row for row in found if row["name"] == name and row["dtype"] == dtype]
            most = (
                {
                    what: [max(row[f"sm_{n}"][what] for row in rows) for n in CARDS]
                    for what in ("registers", "spilled", "shared")
                }
                if rows
                else {}
            )
            cells.append(
                f"{', '.join(map(str, most['registers']))}; {max(most['shared']) / 1024:.1f}; {max(most['spilled'])}"
                if rows
                else ""
            )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_table(path: Path, text: str) -> None:
    """Replace what is between `MARKS` in a file."""
    before, _, rest = path.read_text().partition(MARKS[0])
    _, found, after = rest.partition(MARKS[1])
    if not found:
        raise SystemExit(f"{path} has no lines {MARKS[0]} and {MARKS[1]}")
    path.write_text(f"{before}{MARKS[0]}\n{text}{MARKS[1]}{after}")


def _fits(row: dict[str, Any]) -> bool:
    usages = {n: row[f"sm_{n}"] for n in CARDS}
    return all(u["spilled"] == 0 and u["shared"] <= CARDS[n] for n, u in usages.items())


def here() -> None:
    """Compile what the benchmark launches for the card in this machine."""
    shapes = [*((shape, torch.bfloat16) for shape in NETWORKS.values()), *ALSO]
    jobs, seen = [], set()
    for shape, dtype in shapes:
        for i, launch in enumerate(launches_of(*shape, dtype)):
            key = _specialised(launch)
            if key not in seen:
                seen.add(key)
                jobs.append((launch[0].__name__, shape, dtype, i))
    slow = ("_weight_gradient", "_convolve_kernel", "_multiply_kernel")
    jobs.sort(key=lambda job: (job[0] not in slow, -job[1][1]))
    start = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        for name, seconds in pool.imap_unordered(_compile_here, jobs):
            print(f"{name} {seconds:.1f} s", flush=True)
    print(f"{len(jobs)} kernels in {time.perf_counter() - start:.0f} s")


def _compile_here(job: tuple[str, tuple[int, int, int, int], torch.dtype, int]) -> tuple[str, float]:
    _, shape, dtype, i = job
    start = time.perf_counter()
    kernel, arguments, options = launches_of(*shape, dtype)[i]
    values = [arguments[name] for name in kernel.arg_names]
    # Triton takes a dtype for an aligned tensor of it
    kernel.warmup(*(v.dtype if isinstance(v, torch.Tensor) else v for v in values), grid=(1,), **options)
    return kernel.__name__, time.perf_counter() - start


def _specialised(launch: Launch) -> tuple[Any, ...]:
    """Return what one compiled kernel is for: Triton makes another one for 1 and for multiples of 16."""
    kernel, arguments, options = launch
    values = []
    for parameter in kernel.params:
        value = arguments[parameter.name]
        if isinstance(value, torch.Tensor):
            value = value.dtype
        elif type(value) is int and not parameter.is_constexpr:
            value = (value == 1, value % 16 == 0)
        values.append(value)
    return (kernel.__name__, *values, *sorted(options.items()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the first network in bf16 alone")
    parser.add_argument("--write", type=Path, help="the file with the table, such as docs/log.md")
    parser.add_argument("--here", action="store_true", help="compile for the card in this machine, print no table")
    options = parser.parse_args()
    if options.here:
        here()
        return 0
    networks = dict(list(NETWORKS.items())[: 1 if options.quick else None])
    found = table(networks, [torch.bfloat16] if options.quick else [torch.bfloat16, torch.float32])
    text = markdown(found, options.quick)
    print(text)
    if options.write:
        write_table(options.write, text)
    wrong = [row["kernel"] for row in found if not _fits(row)]
    print(f"{len(found)} kernels, {len(wrong)} spill or do not fit", *wrong, sep="\n  ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
