"""A first run in about a minute: 1,797 real scans of handwritten digits, 8x8 pixels, shipped inside scikit-learn.

    convmixer train digits

Expected: TODO
"""

from convmixer.config import Config


def config() -> Config:
    """Return the settings."""
    return Config(
        model="convmixer_64_6_p1_k5",
        val_fraction=0.1,
        workers=0,
        epochs=30,
        batch_size=64,
        lr=0.02,
        weight_decay=0.01,
        eps=1e-3,
        clip_norm=1.0,
        schedule="piecewise",
        smoothing=0.1,
        scale=(0.8, 1.0),
        ratio=(0.9, 1.1),
        train_interpolation="bilinear",
    )
