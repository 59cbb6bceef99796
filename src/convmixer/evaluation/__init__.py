"""Measures models on images: accuracy with its confidence interval, calibration, per-class results, BatchNorm."""
