"""Measures speed and memory of this package's kernels and of other runtimes ("peers"), interleaved on one machine."""
