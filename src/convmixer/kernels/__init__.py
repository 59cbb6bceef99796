"""Kernels for the ConvMixer block: what every device shares, and a room for each device, built on first use."""

from convmixer.kernels import cuda
from convmixer.kernels.cpu import available, why_not

__all__ = ["available", "cuda", "why_not"]
