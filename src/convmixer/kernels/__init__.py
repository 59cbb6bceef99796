"""CPU kernels for the ConvMixer block, shipped as source and built on first use."""

from convmixer.kernels.build import available, why_not

__all__ = ["available", "why_not"]
