"""Compile every CUDA kernel for cards that are not here, and print registers, spills and shared memory.

    python tools/cuda_resources.py [--quick] [--json FILE]

Needs no GPU: the kernels are launched on shapes alone (meta tensors), each launch is written down and compiled for
compute capability 8.0, 9.0 and 12.0. Exits with 1 if a kernel spills or needs more shared memory than a card has. A
few minutes on two cores. The table is in docs/log.md.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
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
Launch = tuple[JITFunction, dict[str, Any], dict[str, Any]]


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


def compile_for(launch: Launch, capability: int) -> dict[str, int]:
    """Return registers, spilled bytes and shared memory of a launch's kernel on a card."""
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
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
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
                found[key] = {"kernel": key, "network": name}
                for capability in CARDS:
                    found[key][f"sm_{capability}"] = compile_for(launch, capability)
                print(_line(found[key]), flush=True)
    return list(found.values())


def _line(row: dict[str, Any]) -> str:
    cells = [" ".join(str(row[f"sm_{n}"][what]) for what in ("registers", "spilled", "shared")) for n in CARDS]
    return f"| {row['kernel']} | {' | '.join(cells)} |"


def _fits(row: dict[str, Any]) -> bool:
    usages = {n: row[f"sm_{n}"] for n in CARDS}
    return all(u["spilled"] == 0 and u["shared"] <= CARDS[n] for n, u in usages.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the first network in bf16 alone")
    parser.add_argument("--json", type=Path, help="write the table here too")
    options = parser.parse_args()
    networks = dict(list(NETWORKS.items())[: 1 if options.quick else None])
    print("| kernel | " + " | ".join(f"sm_{n}: registers, spilled, shared" for n in CARDS) + " |\n|---|---|---|---|")
    found = table(networks, [torch.bfloat16] if options.quick else [torch.bfloat16, torch.float32])
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    wrong = [row["kernel"] for row in found if not _fits(row)]
    print(f"{len(found)} kernels, {len(wrong)} spill or do not fit", *wrong, sep="\n  ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
