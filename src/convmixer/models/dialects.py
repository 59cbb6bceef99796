"""Checkpoints written by others: read safely, renamed to timm's keys, their sizes found from the tensors.

Understood are the authors' files (numeric `nn.Sequential` keys), timm's and mmpretrain's, plain or inside a training
checkpoint, with or without the prefixes that wrappers add. Our own format is in weights.py.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from convmixer.errors import RequestError, shown
from convmixer.models.allowed import check_build
from convmixer.models.convmixer import ConvMixer
from convmixer.models.reading import State, check_tensors, fit, read_file

# where training checkpoints keep the weights; the averaged ones first, as they are the ones evaluated
CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict")
MAX_DEPTH = 8  # containers inside each other
WRAPPERS = ("module.", "_orig_mod.", "model.")  # DataParallel, torch.compile, Lightning


@dataclass(frozen=True)
class Checkpoint:
    """A foreign ConvMixer checkpoint.

    Args:
        state: Tensors under timm's keys, fp32.
        args: Arguments of `ConvMixer` found from the tensors.
        found: What was found, in words.
    """

    state: State
    args: dict[str, Any]
    found: str


def read_checkpoint(path: Path) -> Checkpoint:
    """Return the ConvMixer in a checkpoint of any dialect.

    Raises:
        RequestError: The file is unreadable, holds code, is no ConvMixer, or has tensors missing or misshapen.
    """
    state, place = find_state(read_file(path), path)
    dialect, state = to_timm_keys(state, path)
    args = find_args(state, path)
    state = _complete(state, args, path)
    sizes = ", ".join(f"{name} {value}" for name, value in args.items())
    return Checkpoint(state, args, f"{dialect} keys{place}: {sizes}")


def find_state(content: Any, path: Path) -> tuple[State, str]:
    """Return the state dict inside a checkpoint's contents, wrapper prefixes removed, and where it was.

    Raises:
        RequestError: There is none.
    """
    place = ""
    for _ in range(MAX_DEPTH):  # a checkpoint may hold itself
        if not isinstance(content, Mapping) or _is_state(content):
            break
        name = next((key for key in CONTAINERS if isinstance(content.get(key), Mapping)), None)
        if name is None:
            raise RequestError(
                f"{path} holds no weights: no tensors, and none of the entries {', '.join(CONTAINERS)}"
            )
        content, place = content[name], f" in {name!r}"
    if not isinstance(content, Mapping):
        raise RequestError(f"{path} holds a {type(content).__name__}, not a dict of weights")
    found = {str(key): value for key, value in content.items() if isinstance(value, torch.Tensor)}
    if not found:
        raise RequestError(f"{path} holds no weights: its containers have no tensors in them")
    state = check_tensors(found, path)
    while prefix := next((p for p in WRAPPERS if all(key.startswith(p) for key in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state, place


def _is_state(content: Mapping[Any, Any]) -> bool:
    return sum(isinstance(value, torch.Tensor) for value in content.values()) > len(content) / 2


def to_timm_keys(state: State, path: Path) -> tuple[str, State]:
    """Return the dialect's name and the tensors under timm's keys.

    Raises:
        RequestError: The keys are those of no ConvMixer that we know.
    """
    if "stem.0.weight" in state:
        return "timm", state
    if "backbone.stem.0.weight" in state:
        return "mmpretrain", _rename(state, _from_mmpretrain)
    if "0.weight" in state and "3.0.fn.0.weight" in state:
        depth = sum(key.endswith(".0.fn.0.weight") for key in state)
        return "the authors'", _rename(state, lambda key: _from_authors(key, depth))
    keys = ", ".join(shown(key) for key in sorted(state)[:3])
    raise RequestError(f"{path} is not a ConvMixer of the authors, timm or mmpretrain (its keys: {keys}, ...)")


def _rename(state: State, rename: Callable[[str], str]) -> State:
    return {rename(key): value for key, value in state.items()}


def _from_mmpretrain(key: str) -> str:
    for theirs, ours in (("backbone.stem.", "stem."), ("backbone.stages.", "blocks."), ("head.fc.", "head.")):
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    return key


def _from_authors(key: str, depth: int) -> str:
    """nn.Sequential(conv, act, norm, *blocks, pool, flatten, linear) -> stem.{0,2}, blocks.N, head."""
    number, _, rest = key.partition(".")
    index = int(number) if re.fullmatch(r"[0-9]{1,6}", number) else -1
    if 0 <= index < 3:
        return f"stem.{key}"
    if 3 <= index < 3 + depth:
        return f"blocks.{index - 3}.{rest}"
    return f"head.{rest}" if index == 3 + depth + 2 else key


def find_args(state: State, path: Path) -> dict[str, Any]:
    """Return the arguments of `ConvMixer` that the tensors of a state dict with timm's keys imply.

    The activation leaves no tensor: it is ReLU for the 768/32 sizes of the released weights, else GELU.

    Raises:
        RequestError: The tensors that tell are missing or misshapen.
    """
    stem, kernel = state.get("stem.0.weight"), state.get("blocks.0.0.fn.0.weight")
    if stem is None or kernel is None or stem.ndim != 4 or kernel.ndim != 4:
        raise RequestError(f"{path} lacks the patch embedding or the first block of a ConvMixer")
    depth = 1 + max(int(m[1]) for key in state if (m := re.match(r"blocks\.([0-9]{1,9})\.", key)))
    if depth > len(state):
        raise RequestError(f"{path} names block {depth - 1} but holds {len(state)} tensors")
    dim, in_chans, patch_size, _ = stem.shape
    head = state.get("head.weight")
    args = {
        "dim": dim,
        "depth": depth,
        "kernel_size": kernel.shape[-1],
        "patch_size": patch_size,
        "in_chans": in_chans,
        "num_classes": 0 if head is None or not head.ndim else head.shape[0],
    }
    relu = (dim, depth, args["kernel_size"], patch_size) == (768, 32, 7, 7)
    return args | {"act": "relu" if relu else "gelu"}


def _complete(state: State, args: dict[str, Any], path: Path) -> State:
    """Return the tensors in fp32 with the counters that old files lack, checked against the model."""
    sizes = {key: value for key, value in args.items() if key not in ("num_classes", "in_chans")}
    try:
        check_build("convmixer", sizes, args["num_classes"], args["in_chans"], len(state))
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from error
    with torch.device("meta"):
        model = ConvMixer(**args)
    counters = {key: torch.tensor(0) for key in model.state_dict() if key.endswith("num_batches_tracked")}
    return fit(counters | state, model, path)
