"""What can be said of the CUDA kernels without running them: they compile, add in order, and say why if they fail."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from load_tool import load_tool

pytest.importorskip("triton", reason="Triton is not installed")
from convmixer.kernels import cuda

KERNELS = Path(cuda.__file__).parent


def _called(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            yield node.attr


def test_no_kernel_adds_by_atomics_or_is_chosen_by_time() -> None:
    """Both would make results differ from one run to the next."""
    for path in KERNELS.glob("*.py"):
        forbidden = {name for name in _called(path) if "atomic" in name or "autotune" in name or name == "heuristics"}
        assert not forbidden, path.name


def _intermediate(tool: Any, launch: Any) -> str:
    """Return Triton's own code of a launch: types and shapes are checked, nothing is optimised."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    backend, context = make_backend(GPUTarget("cuda", 90, 32)), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source, options = tool.source_of(launch)
    return str(
        source.make_ir(
            GPUTarget("cuda", 90, 32), backend.parse_options(options), backend.get_codegen_implementation(
                backend.parse_options(options)
            ), backend.get_module_map(), context,
        )
    )  # fmt: skip


# width, kernel size, positions on a side, batch: every kernel size; one position and one image; off the block
FEW = [(264, 4, 3, 1), (8, 3, 1, 1), (1, 3, 2, 2)]
ALL = [*((40, k, 5, 2) for k in range(1, 16)), (35, 2, 4, 1), (16, 1, 1, 3), *FEW]


@pytest.mark.parametrize(
    ("dtype", "shapes"),
    [
        (torch.bfloat16, FEW),
        *(
            pytest.param(dtype, ALL, marks=pytest.mark.slow)
            for dtype in (torch.float32, torch.float16, torch.bfloat16)
        ),
    ],
)
def test_every_launch_is_valid_for_a_gpu(dtype: torch.dtype, shapes: list[tuple[int, int, int, int]]) -> None:
    """The interpreter is less strict than the compiler. Activations alternate, and equal launches are tried once."""
    tool = load_tool("cuda_resources")
    seen = set()
    for number, shape in enumerate(shapes):
        for launch in tool.launches_of(*shape, dtype, act=number % 2):
            key = tool._specialised(launch)
            if key not in seen:
                seen.add(key)
                assert "tt.func" in _intermediate(tool, launch)
    assert len(seen) > 30


def test_a_triton_that_cannot_launch_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without a C compiler: here there is no GPU to launch on. Plain PyTorch then runs instead."""
    cuda._fails.cache_clear()
    place = torch.device("cpu")
    if torch.cuda.is_available():
        monkeypatch.setattr("convmixer.kernels.cuda.sums._total", None)
    assert str(cuda._fails(place)).startswith("Triton does not work: ")
    cuda._fails.cache_clear()
