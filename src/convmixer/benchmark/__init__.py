"""Speed and memory of this package's kernels and of other runtimes ("peers"), measured alternately on the same
machine.
"""
