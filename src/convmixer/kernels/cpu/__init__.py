"""The CPU kernels: C++ source, the builder that compiles it on first use, and the whole network as one op."""

from convmixer.kernels.cpu.build import available, why_not

__all__ = ["available", "why_not"]
