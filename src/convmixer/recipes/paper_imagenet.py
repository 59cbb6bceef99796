"""ConvMixer-1536/20 on ImageNet-1k in 150 epochs, the authors' command (github.com/locuslab/convmixer, README).

    torchrun --nproc-per-node 10 -m convmixer train IMAGENET_FOLDER --recipe paper-imagenet

Expected: 81.37% top-1 of the ImageNet validation set is what the authors' README gives for their weights, after about
9 days on 10 RTX 8000 (48 GB each), as they say in issue #12. IMAGENET_FOLDER holds `train` and `val`, each with one
folder per class. `--grad-accum` saves memory at the same batch of 640. ConvMixer-768/32 took 300 epochs: recipe
paper-imagenet-300. Other sizes: `--model convmixer_1024_20`.

Settings that the command leaves out have the defaults of the timm fork it ran in: weight decay 2e-5 with none on
biases and 1-D parameters, smoothing 0.1, crop scale 0.08 to 1, aspect ratio 3/4 to 4/3, random interpolation, seed
42.
"""

from convmixer.config import Config


def config() -> Config:
    """Return the settings."""
    return Config(
        model="convmixer_1536_20",
        img_size=224,
        val_fraction=0.0,
        workers=10,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        interpolation="bicubic",
        crop_pct=0.96,
        scale=(0.08, 1.0),
        ratio=(3 / 4, 4 / 3),
        train_interpolation="random",
        hflip=0.5,
        auto_augment="rand-m9-mstd0.5-inc1",
        random_erasing=0.25,
        erasing_mode="pixel",
        mixup=0.5,
        cutmix=0.5,
        mixup_prob=1.0,
        mixup_switch_prob=0.5,
        smoothing=0.1,
        epochs=150,
        batch_size=640,
        lr=0.01,
        weight_decay=2e-5,
        eps=1e-3,
        clip_norm=1.0,
        schedule="piecewise",
        seed=42,
    )
