"""Your own images, a few hundred or more: the default for every data set but the bundled digits.

    convmixer train FOLDER                                          from scratch
    convmixer train FOLDER --weights WEIGHTS --lr 0.001 --epochs 15 from existing weights

Expected: it depends on the images; run `convmixer plan FOLDER` first for the time. FOLDER holds one folder of images
per class. A tenth of them is held out to choose the best epoch, and the test split is read once, at the end.

From scratch, the model is a ConvMixer-256/8 with a grid of 16 x 16 patches, so the cost of a step does not depend on
`--img-size` (594,186 parameters at 32 px). Augmentation is moderate: flips, crops of at least half the
area, light RandAugment and erasing, label smoothing; a moving average of the weights smooths the noise of small sets.
"""

from convmixer.config import Config


def config() -> Config:
    """Return the settings."""
    return Config(
        model="auto",
        val_fraction=0.1,
        workers="auto",
        scale=(0.5, 1.0),
        ratio=(3 / 4, 4 / 3),
        hflip=0.5,
        auto_augment="rand-m6-mstd0.5-inc1",
        random_erasing=0.1,
        smoothing=0.1,
        epochs=40,
        batch_size=32,
        lr=0.005,
        weight_decay=0.01,
        eps=1e-3,
        clip_norm=1.0,
        schedule="piecewise",
        ema_decay=0.998,
    )
