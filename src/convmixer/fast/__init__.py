"""Runs models on the kernels: `accelerate` for training, `optimize_for_inference` for inference."""

from convmixer.fast.inference import optimize_for_inference
from convmixer.fast.support import has_kernels
from convmixer.fast.training import FastConvMixer, accelerate, uses_kernels

__all__ = ["FastConvMixer", "accelerate", "has_kernels", "optimize_for_inference", "uses_kernels"]
