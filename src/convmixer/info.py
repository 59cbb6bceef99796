"""The command `info`: versions, devices, the processor, the kernels, and what is missing."""

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from typing import Any

import torch
from packaging.requirements import Requirement

from convmixer import kernels
from convmixer._version import __version__
from convmixer.benchmark.fared import fared
from convmixer.device import gpu_names
from convmixer.kernels.cpu import build
from convmixer.records import processor_name, version_of

_PACKAGES = ("torchvision", "timm", "pytorch-lightning", "onnxruntime", "openvino", "fastapi", "optuna")
_FOR_DEVELOPERS = ("dev", "fuzz")  # extras that are only for developers
_SHOWN = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd", "bf16", "sve")


def info() -> dict[str, Any]:
    """Print and return the versions, devices, processor and kernels; builds the kernels on first use."""
    found = {"convmixer": __version__, "python": platform.python_version(), "torch": torch.__version__}
    found |= {name: version for name in _PACKAGES if (version := version_of(name))}
    reason = kernels.why_not()
    described = {
        "versions": found,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": processor_name(),
        "instructions": [name for name in _SHOWN if name in build.processor().split()],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": _devices(),
        "kernels": {
            "available": reason is None,
            "why_not": reason,
            "target": build.target(),
            "level": build.level() if reason is None else None,
            "fared": fared() if reason is None else [],
            "library": str(build.library()) if reason is None else None,
        },
        "gpu_kernels": _gpu_kernels(),
        "missing": missing(),
    }
    _print(described)
    return described


def missing() -> dict[str, list[str]]:
    """Return extra -> requirements that are not installed or too old; the extra "" is the package itself."""
    try:
        about = importlib.metadata.metadata("convmixer")
        needed = [Requirement(line) for line in importlib.metadata.requires("convmixer") or []]
    except importlib.metadata.PackageNotFoundError:  # run from a source tree that is not installed
        return {}
    extras = [name for name in about.get_all("Provides-Extra") or [] if name not in _FOR_DEVELOPERS]
    found = {name: [str(r.name) + str(r.specifier) for r in needed if lacks(r, name)] for name in ["", *extras]}
    return {name: packages for name, packages in found.items() if packages}


def lacks(requirement: Requirement, extra: str) -> bool:
    """Return whether a requirement of an extra (with "": of the package itself) is not installed or too old."""
    asked, always = (
        requirement.marker is None or requirement.marker.evaluate({"extra": name}) for name in (extra, "")
    )
    if not asked or (extra and always):
        return False
    version = version_of(requirement.name)
    return version is None or not requirement.specifier.contains(version, prereleases=True)


def _devices() -> list[str]:
    return ["cpu", *gpu_names(), *(["mps"] if torch.backends.mps.is_available() else [])]


def _gpu_kernels() -> dict[str, Any]:
    """Return whether the CUDA kernels can be used, and the version of Triton."""
    reason = "there is no CUDA device"
    if torch.cuda.is_available():
        reason = kernels.cuda.why_not(torch.device("cuda"), torch.bfloat16) or ""
    return {"available": not reason, "why_not": reason or None, "triton": version_of("triton")}


def _in_words(missing: Mapping[str, list[str]]) -> list[str]:
    """Return a line for each extra that lacks something, and for the package itself."""
    lines = []
    for extra, packages in missing.items():
        name = f"convmixer[{extra}]" if extra else "convmixer"
        lines.append(f"{', '.join(packages)}: pip install '{name}'")
    return lines or ["nothing"]


def _print(described: dict[str, Any]) -> None:
    built = described["kernels"]
    versions = ", ".join(f"{name} {version}" for name, version in described["versions"].items())
    instructions = ", ".join(described["instructions"]) or "none that matter here"
    print(f"versions    {versions}")
    print(f"system      {described['system']}, {described['threads']} of {described['cores']} cores in use")
    print(f"processor   {described['processor']}: {instructions}")
    print(f"devices     {', '.join(described['devices'])}")
    on_gpu = described["gpu_kernels"]
    print(f"kernels     {built['library'] or 'not used, plain PyTorch runs instead: ' + built['why_not']}")
    if built["level"]:
        print(f"level       {built['level']}")
        measured = built["fared"] or ["not measured on this machine: `convmixer benchmark` measures it"]
        print("\n".join(f"fared       {line}" for line in measured))
    print(
        f"on GPU      {'not used: ' + on_gpu['why_not'] if on_gpu['why_not'] else 'Triton ' + str(on_gpu['triton'])}"
    )
    print("\n".join(f"missing     {line}" for line in _in_words(described["missing"])))
