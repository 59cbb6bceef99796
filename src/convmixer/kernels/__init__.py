"""Kernels for the ConvMixer block: the parts that all devices share, and a folder per device."""

from convmixer.kernels import cuda
from convmixer.kernels.cpu import available, why_not

__all__ = ["available", "cuda", "why_not"]
