"""Reads checkpoints of other programs ("dialects"): renames their keys to timm's, and finds sizes from the tensors.

It reads the files of the authors (numeric `nn.Sequential` keys), of timm and of mmpretrain: plain weights or training
checkpoints, with any prefix before the keys. weights.py reads our own format.
"""

import argparse
import functools
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from convmixer.errors import RequestError, shown
from convmixer.models.allowed import check_build
from convmixer.models.convmixer import ConvMixer
from convmixer.models.reading import State, check_count, check_tensors, fit, read_file
from convmixer.preprocess import FILTERS

AVERAGES = re.compile(r"(^|[^a-z])(ema|swa|avg|averaged?)([^a-z]|$)", re.IGNORECASE)
WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")  # texts added anywhere in a key
MAX_DEPTH, MAX_CONTAINERS = 8, 10_000  # limits on how deep dicts are nested, and on their number
_OWN = ("stem", "blocks", "head")


@dataclass(frozen=True)
class Checkpoint:
    """A ConvMixer from another program's checkpoint.

    Args:
        state: Tensors with timm's keys, fp32.
        args: Arguments of `ConvMixer`, found from the tensors.
        said: Fields of `Preprocessing` that the file contains.
        found: A text for the user: what was found, what was left out.
    """

    state: State
    args: dict[str, Any]
    said: dict[str, Any]
    found: str


@dataclass(frozen=True)
class _Candidate:
    """A possible ConvMixer inside a checkpoint: its tensors with timm's keys, and keys that do not belong to it."""

    place: str
    dialect: str
    state: State
    left: tuple[str, ...]

    @property
    def rank(self) -> tuple[bool, int]:
        return bool(AVERAGES.search(self.place)), len(self.state)


def read_checkpoint(path: Path) -> Checkpoint:
    """Return the ConvMixer in a checkpoint of any known dialect, with any prefix, in any container.

    If there are several, an average of the weights is preferred (EMA or SWA, recognised by its name), then the
    largest model.

    Raises:
        RequestError: The file cannot be read or contains code; it has no ConvMixer, or several that are equally
            likely; or tensors are missing or have the wrong shape.
    """
    content = read_file(path)
    chosen, others = _choose(list(_candidates(content, path)), content, path)
    args = find_args(chosen.state, path)
    state = _complete(check_tensors(chosen.state, path), args, path)
    sizes = ", ".join(f"{name} {value}" for name, value in args.items())
    place = f" in {shown(chosen.place)!r}" if chosen.place else ""
    notes = [f"{chosen.dialect} keys{place}: {sizes}"]
    if args["act"] == "relu":
        notes.append("ReLU is assumed, as in the released 768/32 (the authors' listing has GELU: --act gelu)")
    if others:
        notes.append(f"not taken: {', '.join(shown(other.place) or 'the other weights' for other in others[:3])}")
    if chosen.left:
        more = f" and {len(chosen.left) - 3} more" if len(chosen.left) > 3 else ""
        notes.append(f"left out: {', '.join(map(shown, chosen.left[:3]))}{more}")
    return Checkpoint(state, args, _preprocessing_said(content, args["in_chans"]), "; ".join(notes))


def _choose(candidates: list[_Candidate], content: Any, path: Path) -> tuple[_Candidate, list[_Candidate]]:
    """Return the candidate to use, and the others.

    Raises:
        RequestError: There is no candidate, or several are equally likely.
    """
    if not candidates:
        raise _nothing(content, path)
    first, *others = sorted(candidates, key=lambda candidate: candidate.rank, reverse=True)
    for other in others:
        if other.rank == first.rank and not _same(first.state, other.state):
            raise RequestError(
                f"{path} holds several models, one {_where(first)} and one {_where(other)}: "
                "save the one you want in a separate file"
            )
    return first, others


def _where(candidate: _Candidate) -> str:
    return f"under {shown(candidate.place)!r}" if candidate.place else "at the top level"


def _same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(one[key] is other[key] for key in one)


def _nothing(content: Any, path: Path) -> RequestError:
    if not isinstance(content, Mapping):
        return RequestError(f"{path} holds a {shown(type(content).__name__)}, not a dict of weights")
    state = max((_tensors(part) for _, part in _containers(content)), key=len)
    if not state:
        return RequestError(f"{path} holds no weights: there are no tensors in it")
    keys = ", ".join(shown(key) for key in sorted(state)[:3])
    return RequestError(f"{path} is not a ConvMixer of the authors, timm or mmpretrain (its keys: {keys}, ...)")


def _containers(content: Any) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Yield each dict inside a checkpoint once, with the keys that lead to it; a dict may contain itself."""
    waiting: deque[tuple[tuple[str, ...], Any]] = deque([((), content)])
    seen: set[int] = set()
    while waiting and len(seen) < MAX_CONTAINERS:
        names, part = waiting.popleft()
        if not isinstance(part, Mapping) or id(part) in seen:
            continue
        seen.add(id(part))
        yield ".".join(names), part
        if len(names) < MAX_DEPTH:
            waiting.extend(((*names, str(key)), value) for key, value in part.items() if isinstance(value, Mapping))


def _tensors(part: Mapping[Any, Any]) -> State:
    tensors = {str(key): value for key, value in part.items() if isinstance(value, torch.Tensor)}
    for wrapper in WRAPPERS:
        tensors = {key.replace(wrapper, ""): value for key, value in tensors.items()}
    return tensors


def _candidates(content: Any, path: Path) -> Iterator[_Candidate]:
    for place, part in _containers(content):
        tensors = _tensors(part)
        check_count(len(tensors), path)
        for prefix, (dialect, rename) in _dialects(tensors).items():
            state, left = {}, []
            for key, value in tensors.items():
                name = rename(key.removeprefix(prefix)) if key.startswith(prefix) else ""
                top = name.partition(".")[0]
                if top in _OWN or re.fullmatch("[0-9]+", top):  # numbers: the authors' keys
                    state[name] = value
                else:
                    left.append(key)
            yield _Candidate(f"{place} {prefix}".strip(), dialect, state, tuple(left))


def _dialects(tensors: State) -> dict[str, tuple[str, Callable[[str], str]]]:
    """Return the prefixes under which a state dict holds a ConvMixer, each with the dialect and its renaming."""
    found: dict[str, tuple[str, Callable[[str], str]]] = {}
    for key in tensors:
        prefix = key.removesuffix("blocks.0.0.fn.0.weight")
        if prefix != key and f"{prefix}stem.0.weight" in tensors:
            found[prefix] = "timm", str
        prefix = key.removesuffix("backbone.stages.0.0.fn.0.weight")
        if prefix != key and f"{prefix}backbone.stem.0.weight" in tensors:
            found[prefix] = "mmpretrain", _from_mmpretrain
        prefix = key.removesuffix("3.0.fn.0.weight")
        if prefix != key and f"{prefix}0.weight" in tensors and (not prefix or prefix.endswith(".")):
            depth = sum(k.startswith(prefix) and k.endswith(".0.fn.0.weight") for k in tensors)
            found[prefix] = "the authors'", functools.partial(_from_authors, depth=depth)
    return found


def _preprocessing_said(content: Any, in_chans: int) -> dict[str, Any]:
    """Return the preprocessing settings among the training arguments in timm's checkpoints."""
    args = content.get("args") if isinstance(content, Mapping) else None
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    if not isinstance(args, Mapping):
        return {}
    size = args.get("img_size") or args.get("input_size")
    said: dict[str, Any] = {"img_size": size[-1] if isinstance(size, (list, tuple)) and size else size}
    said |= {key: args.get(key) for key in ("mean", "std", "crop_pct", "interpolation")}
    said = {key: value for key, value in said.items() if value is not None}
    for key in ("mean", "std"):
        if isinstance(said.get(key), (list, tuple)) and len(said[key]) == 1:
            said[key] = tuple(said[key]) * in_chans
    if not isinstance(said.get("interpolation"), str) or said["interpolation"] not in FILTERS:
        said.pop("interpolation", None)  # timm's "" and "random" are for training, and say nothing of evaluation
    return said


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
    """Return the arguments of `ConvMixer` for the tensors of a state dict with timm's keys.

    No tensor shows the activation: ReLU is assumed for the 768/32 sizes of the released weights, else GELU.

    Raises:
        RequestError: The tensors that show the sizes are missing or have the wrong shape.
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
