"""A first run in about a minute: 1,797 real scans of handwritten digits, 8x8 pixels, shipped inside scikit-learn.

    convmixer train digits

Expected: about 99% test top-1; docs/results.md lists what seeds reach, 97.78 to 100%. The test split has 360
images, so one image is 0.28 points. It takes 37 to 39 s on 2 cores of an AMD EPYC (family 26, AVX-512) with the C++
kernels, 24 s of them for training.

fp32 on every machine: at this size it is as fast as bf16, and results vary less by processor.
"""

from convmixer.config import Config


def config() -> Config:
    """Return the settings."""
    return Config(
        model="convmixer_64_6_p1_k5",
        val_fraction=0.1,
        workers=0,
        epochs=40,
        batch_size=64,
        lr=0.02,
        weight_decay=0.01,
        eps=1e-3,
        clip_norm=1.0,
        precision="fp32",
        schedule="piecewise",
        smoothing=0.1,
        scale=(0.8, 1.0),
        ratio=(0.9, 1.1),
        train_interpolation="bilinear",
    )
