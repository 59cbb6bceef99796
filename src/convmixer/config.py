"""Every setting of a training run in one frozen dataclass. Standard library only.

A recipe returns a whole `Config`; the command line and YAML files replace single fields, by their names. Nothing here
parses arguments or touches a device.
"""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from convmixer.errors import RequestError, unknown


def setting(default: Any, doc: str, choices: tuple[str, ...] = (), alone: str | None = None) -> Any:
    """Return a dataclass field whose metadata describe its command-line flag.

    Args:
        default: The value if the setting is not given.
        doc: The line that `--help` shows.
        choices: The allowed values; an empty tuple: all values.
        alone: The value if the flag is given without a value; None: that is an error.
    """
    return field(default=default, metadata={"doc": doc, "choices": choices, "alone": alone})


LOGGERS = ("tensorboard", "csv", "wandb", "mlflow", "none")

# settings, the check of their values, and the check in words
_RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "batch_size grad_accum lr eps checkpoint_seconds process_timeout fallback_lr_scale",
        lambda x: x > 0,
        "above 0",
    ),
    ("layer_decay", lambda x: 0 < x <= 1, "above 0 and at most 1"),
    ("momentum", lambda x: 0 <= x < 1, "from 0 to below 1"),
    ("fraction", lambda x: 0 < x <= 1, "above 0 and at most 1"),
    ("views unfreeze_epochs patience", lambda x: x >= 0, "at least 0"),
    ("unfreeze_lr", lambda x: x is None or x > 0, "above 0"),
    ("freeze", lambda x: x is None or x == "all" or x.isdecimal(), "all or a number of blocks"),
    ("workers", lambda x: x == "auto" or x >= 0, "auto or at least 0"),
    ("pad_crop color_jitter mixup cutmix weight_decay clip_norm", lambda x: x >= 0, "at least 0"),
    ("val_fraction test_fraction max_bad_fraction", lambda x: 0 <= x <= 1, "between 0 and 1"),
    ("drop_rate ema_decay smoothing", lambda x: 0 <= x <= 1, "between 0 and 1"),
    ("hflip vflip random_erasing mixup_prob mixup_switch_prob", lambda x: 0 <= x <= 1, "between 0 and 1"),
    ("logger", lambda x: set(x.split(",")) <= {*LOGGERS}, f"of {', '.join(LOGGERS)}, or several with commas between"),
    ("betas", lambda pair: all(0 <= x < 1 for x in pair), "two numbers from 0 to below 1"),
)


@dataclass(frozen=True)
class Config:
    """All settings of one training run. The defaults are ours; `recipes` has the papers' settings."""

    # model
    model: str = setting(
        "auto",
        "model name, see `convmixer models`; auto: that of `weights`, else a ConvMixer-256/8 with a grid of "
        "16 x 16 patches at any image size",
    )
    act: str | None = setting(None, "activation of a ConvMixer; none: the variant's own", ("gelu", "relu"))
    weights: str | None = setting(None, "weights to start from: file, run folder or hub name; none: from scratch")
    freeze: str | None = setting(
        None,
        "layers to freeze; all: all but the classifier, which then trains in seconds; N: stem and N blocks; "
        "none: train all layers",
        alone="all",
    )
    views: int = setting(
        0, "with freeze all: augmented views of each training image to learn from; 0: the image as it is"
    )
    unfreeze_epochs: int = setting(0, "with freeze: further epochs, in which all layers are trained")
    unfreeze_lr: float | None = setting(None, "with freeze: peak learning rate of those epochs; none: a tenth of lr")
    drop_rate: float = setting(0.0, "dropout before the classifier")
    stem_init: str = setting(
        "default", "whiten: the first filters whiten the patches of the training images", ("default", "whiten")
    )
    head_init: str = setting("default", "initial weights of a new classifier", ("default", "zeros"))
    # data
    img_size: int | None = setting(None, "side of the square input in pixels; none: that of the data set")
    val_fraction: float = setting(
        0.1, "share of train held out for validation if the data have no val split; 0: none"
    )
    test_fraction: float = setting(
        0.2, "share held out for the test if the data have no test split, the same for every seed; 0: none"
    )
    path_column: str | None = setting(None, "column of a table that holds the images or their paths; none: automatic")
    label_column: str | None = setting(None, "column of the labels; none: automatic")
    split_column: str | None = setting(
        None, "column that names the split, or COLUMN=VALUE: rows with that value are val; none: automatic"
    )
    image_root: str | None = setting(None, "folder that the paths of a table are relative to; none: automatic")
    group: str | None = setting(
        None, "column, or regular expression on paths, for each image's group; a group stays in one split"
    )
    weight_column: str | None = setting(
        None, "column with each training image's relative weight in the loss; none: all count equally"
    )
    cache: str = setting(
        "auto",
        "keep decoded photos for later epochs in this place; auto: if there is room and decoding takes long",
        ("auto", "memory", "disk", "off"),
    )
    max_bad_fraction: float = setting(0.01, "share of unreadable images above which the run stops")
    fraction: float = setting(1.0, "share of the training images to use, the same of every class, chosen by the seed")
    balance: str = setting(
        "none",
        "balance classes of unequal size; loss: images of rare classes weigh more; sample: are drawn more often",
        ("none", "loss", "sample"),
    )
    workers: int | Literal["auto"] = setting(
        "auto", "data-loading processes; 0: load in the training process; auto: as many as help, by trying"
    )
    mean: tuple[float, ...] | None = setting(None, "mean per channel, 0 to 1; none: that of the data set")
    std: tuple[float, ...] | None = setting(None, "standard deviation per channel; none: that of the data set")
    interpolation: str = setting("bicubic", "resizing filter for evaluation", ("bicubic", "bilinear", "nearest"))
    crop_pct: float = setting(1.0, "share of the resized image that the evaluation crop keeps")
    # augmentation
    scale: tuple[float, float] = setting((1.0, 1.0), "RandomResizedCrop: range of the area kept")
    ratio: tuple[float, float] = setting((1.0, 1.0), "RandomResizedCrop: range of the aspect ratio")
    train_interpolation: str = setting(
        "bicubic", "resizing filter for training", ("bicubic", "bilinear", "nearest", "random")
    )
    pad_crop: int = setting(0, "largest random shift in pixels, with the border mirrored; 0: off")
    hflip: float = setting(0.0, "probability of a horizontal flip")
    hflip_mode: str = setting(
        "random", "alternate: half of the images are flipped, in the next epoch the others", ("random", "alternate")
    )
    vflip: float = setting(0.0, "probability of a vertical flip")
    color_jitter: float = setting(0.0, "strength of brightness, contrast and saturation jitter; 0: off")
    auto_augment: str | None = setting(
        None, "timm policy such as rand-m9-mstd0.5-inc1, or torchvision-randaugment-N-M; none: off"
    )
    augment_on: str = setting(
        "auto",
        "where images are augmented; device: on the device, which keeps all images; after-crop: on the device, after "
        "decoding and crop on the CPU; auto: cpu if there is no GPU, else device if possible, else after-crop",
        ("auto", "cpu", "device", "after-crop"),
    )
    random_erasing: float = setting(0.0, "probability that a box is erased")
    erasing_mode: str = setting("pixel", "what fills the erased box", ("pixel", "const", "rand"))
    mixup: float = setting(0.0, "mixup alpha; 0: off")
    cutmix: float = setting(0.0, "cutmix alpha; 0: off")
    mixup_prob: float = setting(1.0, "probability of mixup or cutmix for a batch")
    mixup_switch_prob: float = setting(0.5, "probability of cutmix if both are on")
    smoothing: float = setting(0.0, "label smoothing")
    # optimisation
    patience: int = setting(0, "epochs without a better validation result after which training ends; 0: never")
    epochs: int = setting(10, "passes over the training set; 0: as many as fit into max_time")
    batch_size: int = setting(64, "images per optimizer step, over all processes and accumulation steps")
    grad_accum: int = setting(1, "number of parts in which a batch is computed, to save memory")
    optimizer: str = setting(
        "adamw", "adamw, muon (AdamW for stem, head and vectors), sgd, lion, or another first-order one of timm's"
    )
    lr: float = setting(0.01, "peak learning rate")
    fallback_lr_scale: float = setting(1.0, "with muon: learning rate of the AdamW part, as a factor on lr")
    layer_decay: float = setting(1.0, "factor on the learning rate for each layer further from the classifier")
    momentum: float = setting(0.9, "momentum of sgd, muon and other optimizers that have one")
    weight_decay: float = setting(0.01, "weight decay")
    decay_norm_and_bias: bool = setting(False, "decay biases and other 1-D parameters too")
    eps: float = setting(1e-3, "epsilon of AdamW and similar optimizers")
    betas: tuple[float, float] = setting((0.9, 0.999), "betas of AdamW and similar optimizers")
    clip_norm: float = setting(1.0, "gradient norm above which gradients are scaled down; 0: off")
    schedule: str = setting(
        "piecewise", "how the learning rate changes over time (at every step)", ("piecewise", "cosine", "constant")
    )
    ema_decay: float = setting(0.0, "decay of the moving average of the weights, reached by a warm-up; 0: off")
    # run
    seed: int = setting(0, "seed of the split, the initial weights, the data order and every augmentation")
    precision: str = setting(
        "auto",
        "auto: bf16 if the device computes it natively or the CPU kernels run, else fp32; tf32: GPUs only",
        ("auto", "fp32", "tf32", "bf16", "fp16"),
    )
    device: str = setting("auto", "where to train", ("auto", "cpu", "cuda", "mps"))
    max_time: str | None = setting(
        None, "time for the whole run, such as 30m or 2h, instead of epochs; with epochs or freeze an upper limit"
    )
    test: bool = setting(True, "read the test split once, at the end")
    draw: bool = setting(True, "draw pictures of the data and the result into the run folder")
    logger: str = setting(
        "tensorboard",
        "where metrics go besides the run folder's tables: tensorboard, wandb (Weights & Biases), mlflow, or several "
        "with commas between; csv or none: nowhere",
    )
    sync_bn: bool = setting(False, "synchronise BatchNorm statistics over processes")
    checkpoint_seconds: float = setting(
        60.0, "seconds between checkpoints within an epoch; there is also one at the end of each epoch"
    )
    process_timeout: float = setting(
        600.0, "with several processes: seconds that one waits for another before it gives up"
    )

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            if choices and value is not None and value not in choices:
                raise RequestError(f"{f.name} must be one of {', '.join(choices)}, not {value!r}")
        for names, fits, words in _RANGES:
            for name in names.split():
                if not fits(getattr(self, name)):
                    raise RequestError(f"{name} must be {words}, not {_text(getattr(self, name))}")
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            numbers = value if isinstance(value, tuple) else (value,)
            if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
                raise RequestError(f"{f.name} must be finite, not {_text(value)}")
        if self.batch_size % self.grad_accum:
            raise RequestError(f"batch_size {self.batch_size} must be a multiple of grad_accum {self.grad_accum}")
        if self.hflip_mode == "alternate" and self.hflip != 0.5:
            raise RequestError(f"hflip_mode alternate flips half of the images: set hflip to 0.5, not {self.hflip}")
        for name in ("views", "unfreeze_epochs", "unfreeze_lr"):
            if getattr(self, name) and self.freeze is None:
                raise RequestError(f"{name} needs freeze: add --freeze, or leave {name} out")
        if self.views and self.freeze != "all":
            raise RequestError(
                "views needs freeze all: if other layers are trained, every epoch draws new views anyway"
            )
        if self.max_time is not None:
            parse_seconds(self.max_time)
        if self.epochs < (self.max_time is None):
            raise RequestError(f"epochs must be above 0, not {self.epochs}, unless max_time is given")


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def parse_seconds(text: str, name: str = "max_time") -> float:
    """Return a time such as "90s", "30m", "1h30m" or "2h" in seconds.

    Args:
        text: The time.
        name: Name of the flag or setting, for the error.

    Raises:
        RequestError: The text is not a time above 0.
    """
    match = re.fullmatch(r"(?:([\d.]+)h)?(?:([\d.]+)m)?(?:([\d.]+)s)?", text.strip().lower())
    try:
        hours, minutes, seconds = (float(part or 0) for part in match.groups()) if match else (0.0, 0.0, 0.0)
    except ValueError:
        hours = minutes = seconds = 0.0
    total = hours * 3600 + minutes * 60 + seconds
    if total <= 0:
        raise RequestError(f"{name} must be a time such as 90s, 30m or 1h30m, not {text!r}")
    return total


def field_types() -> dict[str, Any]:
    """Return the annotated type of every setting by name."""
    return typing.get_type_hints(Config)


def coerce(name: str, value: Any, annotation: Any) -> Any:
    """Return a value from YAML, JSON or the command line as the type of its setting.

    Args:
        name: The setting's name, for the error.
        value: A string, number, bool, list or None. YAML reads 1e-3 as a string, so strings are converted.
        annotation: The setting's type: int, float, str, bool or a tuple of floats; with `| None`, also None.

    Raises:
        RequestError: The value does not fit.
    """
    united = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    options = typing.get_args(annotation) if united else (annotation,)
    if type(None) in options and (value is None or value in ("none", "null", "")):
        return None
    words = [word for o in options if typing.get_origin(o) is Literal for word in typing.get_args(o)]
    if value in words:
        return value
    kind = next(o for o in options if o is not type(None))
    try:
        if typing.get_origin(kind) is tuple:
            return _float_tuple(value, typing.get_args(kind))
        if kind is bool:
            return _bool(value)
        if isinstance(value, (bool, list, tuple, dict)) or value is None:
            raise ValueError
        if kind is int and float(value) != int(float(value)):
            raise ValueError
        if kind is int:
            return value if isinstance(value, int) else int(float(value))  # a large seed would lose digits as a float
        return kind(value)
    except (TypeError, ValueError, KeyError, OverflowError):
        wanted = " or ".join([kind.__name__, *words]) if words else getattr(annotation, "__name__", str(annotation))
        raise RequestError(f"{name} must be {wanted}, not {value!r}") from None


def _float_tuple(value: Any, args: tuple[Any, ...]) -> tuple[float, ...]:
    parts = value.split(",") if isinstance(value, str) else value
    numbers = tuple(float(part) for part in parts)
    if args[-1] is not Ellipsis and len(numbers) != len(args):
        raise ValueError
    return numbers


def _bool(value: Any) -> bool:
    return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[str(value).lower()]


def override(base: Config, values: Mapping[str, Any]) -> Config:
    """Return `base` with some fields replaced.

    If `max_time` is among the values, it replaces the base's epochs. If layers are frozen, the epochs stay and
    `max_time` is only an upper limit, because such a run rarely needs the whole time.

    Args:
        base: The settings to start from.
        values: Name of the setting -> value, as from YAML or the command line; "-" in a name counts as "_".

    Raises:
        RequestError: A name is not a setting (the nearest one is suggested), or a value does not fit.
    """
    hints = field_types()
    clean = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in hints:
            raise unknown("setting", str(key), hints)
        clean[name] = coerce(name, value, hints[name])
    if clean.get("max_time") and not clean.get("freeze", base.freeze):
        clean.setdefault("epochs", 0)
    return dataclasses.replace(base, **clean)


def to_dict(config: Config) -> dict[str, Any]:
    """Return the settings as plain JSON and YAML types; `override(Config(), to_dict(c)) == c`."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}


def difference(base: Config, changed: Config) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ, name -> (value in base, value in changed)."""
    old, new = to_dict(base), to_dict(changed)
    return {name: (old[name], new[name]) for name in old if old[name] != new[name]}
