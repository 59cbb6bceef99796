"""What this installation runs on: versions, devices, the processor, and the CPU kernels, or why there are none."""

import importlib.metadata
import os
import platform
import sys
from typing import Any

import torch

import convmixer
from convmixer import kernels
from convmixer.device import gpu_names
from convmixer.kernels import build

PACKAGES = ("torchvision", "timm", "pytorch-lightning", "onnxruntime", "openvino", "fastapi", "optuna")
_SHOWN = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd", "bf16", "sve")


def info() -> dict[str, Any]:
    """Print and return the versions, devices, processor and kernels; builds the kernels on first use."""
    found = {"convmixer": convmixer.__version__, "python": platform.python_version(), "torch": torch.__version__}
    found |= {name: version for name in PACKAGES if (version := _version(name))}
    reason = kernels.why_not()
    described = {
        "versions": found,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor_name(),
        "instructions": [name for name in _SHOWN if name in build.processor().split()],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": _devices(),
        "kernels": {
            "available": reason is None,
            "why_not": reason,
            "target": build.target(),
            "library": str(build.library()) if reason is None else None,
        },
    }
    _print(described)
    return described


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor_name() -> str:
    if sys.platform == "linux":
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _devices() -> list[str]:
    return ["cpu", *gpu_names(), *(["mps"] if torch.backends.mps.is_available() else [])]


def _print(described: dict[str, Any]) -> None:
    built = described["kernels"]
    versions = ", ".join(f"{name} {version}" for name, version in described["versions"].items())
    instructions = ", ".join(described["instructions"]) or "none that matter here"
    print(f"versions    {versions}")
    print(f"system      {described['system']}, {described['threads']} of {described['cores']} cores in use")
    print(f"processor   {described['processor']}: {instructions}")
    print(f"devices     {', '.join(described['devices'])}")
    print(f"kernels     {built['library'] or 'not used, plain PyTorch runs instead: ' + built['why_not']}")
