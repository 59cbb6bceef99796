"""Which models and arguments a weights file may name; each argument is checked for type and range.

Weights are untrusted. The functions that build models also take arguments that fetch a URL, write a folder or read
another file (timm's `pretrained`, `pretrained_cfg`, `cache_dir`, `checkpoint_path`, ...). Therefore a weights file
may name only known models, and only the arguments listed below.
"""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from convmixer.errors import RequestError, shown
from convmixer.models.registry import SKELETONS, model_args, skeleton
from convmixer.preprocess import MAX_SIDE

MAX_CLASSES = 1_000_000
MAX_WIDTH = 65_536
_MANY = 16  # most numbers in a list with one per stage


@dataclass(frozen=True)
class _Rule:
    """A test for one argument, and a description of the values that pass."""

    words: str
    passes: Callable[[Any], bool]


def _is_int(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _is_ints(value: Any, low: int, high: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) <= _MANY and all(_is_int(v, low, high) for v in value)


def _int(low: int, high: int) -> _Rule:
    return _Rule(f"a whole number from {low} to {high:,}", lambda value: _is_int(value, low, high))


def _ints(low: int, high: int) -> _Rule:
    words = f"whole numbers from {low} to {high:,}"
    return _Rule(words, lambda value: _is_int(value, low, high) or _is_ints(value, low, high))


def _real(low: float, high: float) -> _Rule:
    return _Rule(f"a number from {low} to {high}", lambda value: type(value) in (int, float) and low <= value <= high)


def _optional(rule: _Rule) -> _Rule:
    return _Rule(f"{rule.words}, or null", lambda value: value is None or rule.passes(value))


_FLAG = _Rule("true or false", lambda value: type(value) is bool)
_WORD = _Rule("a short word", lambda value: isinstance(value, str) and bool(re.fullmatch(r"[\w-]{0,32}", value)))
_COUNT, _WIDTH, _SIDE, _RATE = _ints(0, 10_000), _ints(1, MAX_WIDTH), _ints(1, MAX_SIDE), _optional(_real(0, 1))
_RATIO = _Rule(
    "numbers from 0 to 64",
    lambda value: all(
        type(v) in (int, float) and 0 <= v <= 64 for v in (value if isinstance(value, (list, tuple)) else [value])
    ),
)

# grouped by meaning; an argument means the same in every model
_RULES: dict[str, _Rule] = (
    dict.fromkeys(("depth", "depths", "layers", "num_blocks"), _COUNT)
    | dict.fromkeys(
        ("dim", "dims", "embed_dim", "embed_dims", "channels", "num_features", "head_hidden_size"), _WIDTH
    )
    | dict.fromkeys(("heads", "num_heads", "cardinality", "base_width", "stem_width", "output_stride"), _WIDTH)
    | dict.fromkeys(("img_size", "patch_size", "kernel_size", "window_size", "kernel_sizes"), _SIDE)
    | dict.fromkeys(("drop_rate", "drop_path_rate", "drop_block_rate", "attn_drop_rate", "proj_drop_rate"), _RATE)
    | dict.fromkeys(("pos_drop_rate", "patch_drop_rate"), _RATE)
    | dict.fromkeys(("mlp_ratio", "mlp_ratios", "width_factor"), _RATIO)
    | dict.fromkeys(("init_values", "ls_init_value", "layer_scale_init_value"), _optional(_real(0, 100)))
    | dict.fromkeys(("mixer", "stem", "residual", "norm", "act", "stem_type", "global_pool", "pos_embed"), _WORD)
    | dict.fromkeys(("act_layer", "norm_layer"), _optional(_WORD))
    | dict.fromkeys(("qkv_bias", "qk_norm", "class_token", "pre_norm", "no_embed_class", "dynamic_img_size"), _FLAG)
    | dict.fromkeys(("dynamic_img_pad", "strict_img_size", "fc_norm", "final_norm", "use_fc_norm"), _optional(_FLAG))
    | dict.fromkeys(("reg_tokens",), _int(0, 1000))
)
_COUNTS = ("depth", "depths", "layers", "num_blocks")
_CONVMIXER = (
    *("dim", "depth", "kernel_size", "patch_size"),
    *("act", "act_layer", "norm_layer", "drop_rate", "global_pool"),
)
_GIVEN = ("num_classes", "in_chans")  # timm's files repeat them in model_args


def check_build(name: Any, args: Any, num_classes: Any, in_chans: int, tensors: int) -> tuple[str, dict[str, Any]]:
    """Return the registry name and the arguments of the model that a weights file asks for, if both are allowed.

    Args:
        name: The architecture in the file.
        args: The arguments in the file.
        num_classes: Outputs, from the file.
        in_chans: Channels of the image, from the file's preprocessing.
        tensors: Number of tensors in the file; a model has at most as many layers.

    Returns:
        The name ("convmixer", a name in `registry.SKELETONS`, or one that timm knows), and the arguments with all
        sizes.

    Raises:
        RequestError: The model is not known; or an argument is not listed, has the wrong type or is out of range.
    """
    if not isinstance(name, str) or not isinstance(args, Mapping):
        raise RequestError("architecture must be a name and model_args a table")
    if not _is_int(num_classes, 0, MAX_CLASSES):
        raise RequestError(f"num_classes must be a whole number from 0 to {MAX_CLASSES:,}, not {shown(num_classes)}")
    given = {"num_classes": num_classes, "in_chans": in_chans}
    for key in _GIVEN:
        if key in args and args[key] != given[key]:
            raise RequestError(f"model_args says {key} {shown(args[key])}, but the rest of the file {given[key]}")
    name, args = _named(name, {key: value for key, value in args.items() if key not in _GIVEN})
    known = _arguments(name)
    for key, value in args.items():
        _check(name, key, value, known)
    layers = sum(sum(v) if isinstance(v, (list, tuple)) else v for k, v in args.items() if k in _COUNTS)
    if layers > tensors:
        raise RequestError(f"{tensors:,} tensors cannot hold {name} with {layers:,} layers")
    return name, args


def _named(name: str, args: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return a model's plain name and its arguments; the sizes in a ConvMixer's name become arguments."""
    if name == "convmixer" or name in SKELETONS:
        return name, args
    if not re.fullmatch(r"[\w.-]{1,100}", name):
        raise RequestError(f"{shown(name)} is not the name of a model")
    sizes = model_args(name)
    if sizes is not None:
        sizes.pop("num_classes", None)
        return "convmixer", sizes | args
    import timm

    plain = name.partition(".")[0]  # the rest names released weights, but the weights are in the file
    if not timm.is_model(plain):
        raise RequestError(f"{shown(name)} is not a model that this version of timm knows")
    return plain, args


def _arguments(name: str) -> Mapping[str, _Rule]:
    if name == "convmixer":
        return _rules(_CONVMIXER)
    if name in SKELETONS:
        return _rules(inspect.signature(skeleton(name)).parameters)
    return _RULES


def _rules(names: Iterable[str]) -> dict[str, _Rule]:
    """Return the rules for arguments; a file may not set an argument that has no rule."""
    return {name: _RULES[name] for name in names if name in _RULES}


def _check(name: str, key: Any, value: Any, known: Mapping[str, _Rule]) -> None:
    if key not in known:
        raise RequestError(
            f"a weights file may not set the argument {shown(key)} of {name}: remove it from model_args"
        )
    if not known[key].passes(value):
        raise RequestError(f"{key} must be {known[key].words}, not {shown(value)}")
