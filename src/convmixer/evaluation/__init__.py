"""Model and images in, numbers out: accuracy with its interval, calibration, per-class results, BatchNorm."""
