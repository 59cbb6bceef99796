"""Saves weights in our format. Loads our weights, checkpoints of other programs, shipped weights, and those of the
hub.

Our format is timm's hub layout: a folder with tensors and a config. The config's key "convmixer" holds what timm does
not need: the model's full arguments, the recipe, the data. The same JSON is stored inside the .safetensors file, so
that file alone has the class names and the preprocessing.
"""

import itertools
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
import torch.nn as nn
from torch.func import functional_call

from convmixer._version import __version__
from convmixer.errors import RequestError, shown, unknown
from convmixer.files import write_atomic
from convmixer.models import digest
from convmixer.models.allowed import check_build
from convmixer.models.convmixer import ConvMixer
from convmixer.models.dialects import read_checkpoint
from convmixer.models.reading import State, fit, parse_json, read_json, read_safetensors, read_state
from convmixer.models.registry import SHIPPED, VARIANTS, args_of, build_model, free_name, shipped
from convmixer.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from convmixer.run_folder import MODEL, MODEL_CONFIG, weights_folders

# our name -> timm's, for variants that timm has too; plain timm loads what we save of them
TIMM_NAMES = {
    "convmixer_1536_20": "convmixer_1536_20",
    "convmixer_768_32": "convmixer_768_32",
    "convmixer_1024_20": "convmixer_1024_20_ks9_p14",
}
WRAPPED = "timm_model."  # the prefix of every key in files of transformers' TimmWrapper
OLD_MODEL = "pytorch_model.bin"  # the file that timm's save_for_hf and older tools write instead of MODEL
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)  # locuslab/convmixer-cifar10
# how messages name the fields of Preprocessing that `load_model` can override
_MEANING = {
    "img_size": "{} px",
    "mean": "mean {}",
    "std": "std {}",
    "interpolation": "{}",
    "crop_pct": "crop {}",
    "bits": "16-bit images use {} bits",
}
_ARGS = ("dim", "depth", "kernel_size", "patch_size", "act")


@dataclass(frozen=True)
class LoadedModel:
    """A model with its classes, preprocessing and metadata.

    Args:
        model: The model in eval mode, on the CPU, fp32.
        classes: Class names in the order of the outputs.
        preprocessing: How an image becomes the model's input.
        metadata: The metadata saved with the model: "name" and "model_args"; if `save_model` wrote the file, also
            "version" and its further arguments.
        source: The folder or file that the weights came from.
        found: A text that says what the file contains.
    """

    model: nn.Module
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    metadata: dict[str, Any] = field(default_factory=dict)
    source: Path = Path()
    found: str = ""


def save_model(
    folder: Path,
    model: nn.Module,
    *,
    architecture: str,
    model_args: Mapping[str, Any],
    classes: Sequence[str],
    preprocessing: Preprocessing,
    **metadata: Any,
) -> None:
    """Write tensors and config so that convmixer and timm can load them; an interrupted write leaves no partial file.

    `val` and `recalibrate` find the data of a run by metadata["data"]: a dict with "spec" (as `train` was given it)
    and the keyword arguments "val_fraction", "seed", "max_bad_fraction", "img_size" of `load_data`.

    Args:
        folder: The folder to write; it is created if it is missing.
        model: The model, on any device and in any memory format.
        architecture: The model's name for `create_model`.
        model_args: The arguments of `create_model` besides num_classes and in_chans; a ConvMixer knows its own.
        classes: Class names in the order of the outputs.
        preprocessing: How an image becomes the model's input.
        **metadata: Plain JSON values to store: recipe, data, results.

    Raises:
        ValueError: The number of class names differs from the number of outputs.
    """
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    config = hub_config(model, architecture, model_args, classes, preprocessing, metadata)
    inside = json.dumps(config)
    packed = {"format": "pt", "config": inside, digest.KEY: digest.digest_weights(state, inside)}
    write_atomic(folder / MODEL, safetensors.torch.save(state, packed))
    write_atomic(folder / MODEL_CONFIG, json.dumps(digest.with_digest(config), indent=2).encode())


def hub_config(
    model: nn.Module,
    architecture: str,
    model_args: Mapping[str, Any],
    classes: Sequence[str],
    preprocessing: Preprocessing,
    metadata: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the config of weights in timm's hub layout; arguments as in `save_model`."""
    outputs = getattr(model, "num_classes", len(classes))
    if outputs and outputs != len(classes):
        raise ValueError(f"{len(classes)} class names for {outputs} outputs")
    # subclasses from `isotropic` differ in more than their sizes; those from `fast` do not
    plain = isinstance(model, ConvMixer) and (type(model) is ConvMixer or architecture.startswith("convmixer"))
    args = args_of(cast(ConvMixer, model)) if plain else dict(model_args)
    stock = _timm_name(args) if plain else None
    ours = "convmixer" if plain else architecture
    p, theirs = preprocessing, getattr(model, "pretrained_cfg", None) or {}
    pretrained_cfg = {
        "input_size": [p.in_chans, p.img_size, p.img_size],
        "fixed_input_size": bool(theirs.get("fixed_input_size", False)),
        "interpolation": p.interpolation,
        "crop_pct": p.crop_pct,
        "mean": list(p.mean),
        "std": list(p.std),
        "num_classes": outputs,
        "label_names": list(classes),
        "pool_size": None,
        "first_conv": theirs.get("first_conv", "stem.0"),
        "classifier": theirs.get("classifier", "head"),
    }
    deep = {"bits": p.bits} if p.bits != 16 else {}
    return {
        "architecture": stock or ours,
        "num_classes": outputs,
        "num_features": getattr(model, "num_features", None),
        "model_args": {} if stock else args,
        "pretrained_cfg": pretrained_cfg,
        "convmixer": {"name": architecture, "model_args": args, "version": __version__, **metadata, **deep},
    }


def _timm_name(args: Mapping[str, Any]) -> str | None:
    return next((theirs for ours, theirs in TIMM_NAMES.items() if VARIANTS[ours] == dict(args)), None)


def save_changed(folder: Path, loaded: LoadedModel, **metadata: Any) -> None:
    """Save a loaded model after a change, as `save_model` does, with its metadata.

    Args:
        folder: The folder to write.
        loaded: The model with its metadata.
        **metadata: A description of the change, added to the metadata.
    """
    kept = {key: value for key, value in loaded.metadata.items() if key not in ("name", "model_args", "version")}
    save_model(
        folder,
        loaded.model,
        architecture=loaded.metadata["name"],
        model_args=loaded.metadata.get("model_args", {}),
        classes=loaded.classes,
        preprocessing=loaded.preprocessing,
        **kept | metadata,
    )


def load_model(source: str | Path, act: str | None = None, **preprocessing: Any) -> LoadedModel:
    """Return a model that is ready to use, from a path or a name.

    Args:
        source: A run folder (its best weights), a weights folder, a file of any known format, the name of shipped
            weights such as `convmixer_256_8.cifar10`, or of weights on timm's hub: `convmixer_768_32`,
            `hf-hub:OWNER/NAME`, `OWNER/NAME`.
        act: Activation to use instead of the stored or guessed one.
        **preprocessing: Fields of `Preprocessing` that override those stored with the weights: all but `in_chans`,
            which the model's first layer decides.

    Raises:
        RequestError: There are no such weights, or they cannot be used; the message says why.
    """
    loaded = _load(source)
    return _overridden(loaded, act, preprocessing) if act or preprocessing else loaded


def _load(source: str | Path) -> LoadedModel:
    path, name = Path(source), str(source)
    if path.is_dir() or path.is_file():
        load = _load_newest if path.is_dir() else _load_file
        if name not in (*shipped(), *VARIANTS):
            return load(path)
        note = f"{path.absolute()} was taken, not the known model of the same name; to use the model, rename the path"
        try:
            loaded = load(path)
        except RequestError as error:
            raise RequestError(f"{error}; {note}") from None
        return replace(loaded, found=f"{loaded.found}; {note}")
    if name in shipped():
        return _load_folder(SHIPPED / name)
    return _load_newest(_download(_hub_id(name)))


def adapt_channels(weight: torch.Tensor, in_chans: int) -> torch.Tensor:
    """Return patch-embedding weights (dim, C, p, p) for another number of channels.

    They are summed over the colours for one channel, else repeated and scaled. The response to a grey image stays the
    same if `in_chans` is 1 or a multiple of C. timm's function of this kind takes only weights of three channels
    before timm 1.0.31.

    Source: ours, with the rule of timm's `adapt_input_conv`.
    """
    channels = weight.shape[1]
    if in_chans == 1:
        return weight.float().sum(1, keepdim=True).to(weight.dtype)
    repeated = weight.repeat(1, -(-in_chans // channels), 1, 1)[:, :in_chans]
    return repeated if in_chans == channels else repeated * (channels / in_chans)


def _load_newest(path: Path) -> LoadedModel:
    """Return the first intact weights of a folder: the best, else the last, else those in the folder itself.

    Damaged weights are named in a line.
    """
    folders = weights_folders(path)
    if not folders and (path / OLD_MODEL).is_file():
        return _load_file(path / OLD_MODEL)
    if not folders:
        raise RequestError(f"{path} holds no weights: no {MODEL} in it, nor in the weights folders of a run")
    for folder, other in itertools.pairwise(folders):
        try:
            return _load_folder(folder)
        except RequestError as error:
            print(f"{error}; using {other} instead", file=sys.stderr)
    return _load_folder(folders[-1])


def _load_folder(folder: Path) -> LoadedModel:
    return _load_file(folder / MODEL)


def _load_file(path: Path) -> LoadedModel:
    config = _config_of(path)
    if config is None:
        return _load_foreign(path)
    of_mixin = "architecture" not in config and {"dim", "depth"} <= config.keys()  # PyTorchModelHubMixin's
    if of_mixin:
        return _load_foreign(path, config.get("act"))
    return _from_config(config, path)


def _config_of(path: Path) -> dict[str, Any] | None:
    """Return the config beside a hub folder's weights, else the one inside a .safetensors file, or None."""
    if path.suffix != ".safetensors" and path.name != OLD_MODEL:
        return None
    beside = path.with_name(MODEL_CONFIG)
    if path.name in (MODEL, OLD_MODEL) and beside.is_file():
        config = read_json(beside)
        config = digest.check_config(config, beside) if isinstance(config, dict) else config
    elif path.name == OLD_MODEL:
        return None
    else:
        config = parse_json(read_safetensors(path)[1].get("config", "null"), path)
    return config if config is None or isinstance(config, dict) else {}


def _from_config(config: dict[str, Any], path: Path) -> LoadedModel:
    cfg = config.get("pretrained_cfg", config)  # older files of timm's hub have one level
    state = read_state(path)
    if all(key.startswith(WRAPPED) for key in state):
        state = {key.removeprefix(WRAPPED): value for key, value in state.items()}
    try:
        chans, size, width = cfg["input_size"]
        if size != width:
            raise RequestError(f"the input must be square, not {shown(size)} x {shown(width)}")
        keep = {key: cfg[key] for key in ("mean", "std", "interpolation", "crop_pct")}
        preprocessing = Preprocessing(img_size=size, in_chans=chans, bits=_bits(config), **keep)
        classes = config.get("num_classes", cfg.get("num_classes"))
        asked = config.get("model_args") or {}
        name, args = check_build(config.get("architecture"), asked, classes, chans, len(state))
        said = config.get("label_names") or cfg.get("label_names") or config.get("id2label")
        names = _class_names_of(said, classes)
    except RequestError as error:
        raise RequestError(f"the config of {path}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise RequestError(f"the config of {path} does not have timm's hub layout: {shown(error, 200)}") from error
    model = _build(name, classes, chans, args, state, path)
    metadata = _metadata(config.get("convmixer"), model, name, args)
    found = f"{metadata['name']} with {classes} classes, {size} px"
    return LoadedModel(model.eval(), names, preprocessing, metadata, path.parent, found)


def _bits(config: dict[str, Any]) -> Any:
    ours = config.get("convmixer")
    return ours.get("bits", 16) if isinstance(ours, dict) else 16


def _class_names_of(names: Any, num_classes: int) -> tuple[str, ...]:
    """Return the class names in a config, checked against the number of outputs, or those of `class_names`."""
    if names is None or (not names and isinstance(names, list)):
        return class_names(num_classes)
    if isinstance(names, dict) and names.keys() == {str(i) for i in range(len(names))}:
        names = [names[str(i)] for i in range(len(names))]  # timm and transformers may write it as a dict
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RequestError("label_names must be a list of names")
    if num_classes and len(names) != num_classes:
        raise RequestError(f"label_names has {len(names)} names for {num_classes} classes")
    return tuple(names)


def _build(name: str, num_classes: int, in_chans: int, args: dict[str, Any], state: State, path: Path) -> nn.Module:
    """Return the model with its weights; it takes memory only after the shapes have been checked against the file."""
    try:
        with torch.device("meta"):
            model = _new(name, num_classes, in_chans, args)
        state = fit(state, model, path)
        if type(model) is ConvMixer:
            model.load_state_dict(state, assign=True)
            return model
        model = _new(name, num_classes, in_chans, args)
        model.load_state_dict(state)
    except (RequestError, MemoryError):
        raise
    except Exception as error:  # libraries raise many types if sizes do not fit together
        raise RequestError(f"{path}: {name} cannot be built with {shown(args)}: {shown(str(error), 200)}") from error
    return model


def _new(name: str, num_classes: int, in_chans: int, args: dict[str, Any]) -> nn.Module:
    if name == "convmixer":
        return ConvMixer(num_classes=num_classes, in_chans=in_chans, **args)
    return build_model(name, num_classes=num_classes, in_chans=in_chans, **args)


def _metadata(ours: Any, model: nn.Module, name: str, args: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata in a file; "name" and "model_args" are those that built the model."""
    metadata = dict(ours) if isinstance(ours, dict) else {}
    if type(model) is ConvMixer:
        args = args_of(model)
        said = metadata.get("name")
        name = said if said in VARIANTS and _sizes(VARIANTS[said]) == args else free_name(args)
    return metadata | {"name": name, "model_args": args}


def _sizes(args: Mapping[str, Any]) -> dict[str, Any]:
    return {key: args[key] for key in _ARGS}


def _load_foreign(path: Path, act: Any = None) -> LoadedModel:
    checkpoint = read_checkpoint(path)
    args = checkpoint.args | ({"act": act} if act in ("gelu", "relu") else {})
    with torch.device("meta"):
        model = ConvMixer(**args)
    model.load_state_dict(checkpoint.state, assign=True)
    guess = guess_preprocessing(args)
    try:
        p = replace(guess, **checkpoint.said)
    except (ValueError, TypeError) as error:
        raise RequestError(f"the args in {path}: {shown(error, 200)}") from error
    assumed = [key for key in _MEANING if key not in (*checkpoint.said, "bits")]  # few images use them
    notes = [checkpoint.found]
    notes += [f"from its args: {_in_words(p, checkpoint.said)}"] if checkpoint.said else []
    notes += [f"assumed {_in_words(p, assumed)}"] if assumed else []
    metadata = {"name": free_name(args), "model_args": _sizes(args)}
    names = class_names(args["num_classes"])
    return LoadedModel(model.eval(), names, p, metadata, path, "; ".join(notes))


def _in_words(p: Preprocessing, keys: Iterable[str]) -> str:
    return ", ".join(_MEANING[key].format(getattr(p, key)) for key in _MEANING if key in keys)


def _overridden(loaded: LoadedModel, act: str | None, changes: dict[str, Any]) -> LoadedModel:
    """Return a model with its stored activation or preprocessing overridden, and a note on each change."""
    notes = [loaded.found]
    if other := changes.keys() - _MEANING.keys():
        raise RequestError(f"{shown(min(other))} cannot be overridden, only act, {', '.join(_MEANING)}")
    if act is not None:
        loaded, old = _with_act(loaded, act)
        notes.append(f"{act} as asked instead of {old}")
    known = loaded.preprocessing
    try:
        asked = replace(known, **changes)
    except (ValueError, TypeError) as error:
        raise RequestError(str(error)) from error
    for key in changes:
        notes.append(f"{_MEANING[key].format(getattr(asked, key))} as asked instead of {getattr(known, key)}")
    if asked.img_size != known.img_size:
        _check_size(loaded, asked)
    return replace(loaded, preprocessing=asked, found="; ".join(notes))


def _check_size(loaded: LoadedModel, asked: Preprocessing) -> None:
    """Check that the model takes the chosen image size; many models of timm take only one.

    Raises:
        RequestError: The model takes images of the size in its weights, but not of the chosen size.
    """
    problem = _size_problem(loaded.model, asked)
    if problem and not _size_problem(loaded.model, loaded.preprocessing):
        raise RequestError(
            f"{loaded.source}: its {type(loaded.model).__name__} was made for {loaded.preprocessing.img_size} px and "
            f"does not take {asked.img_size} px ({shown(problem, 120)}): leave --img-size out"
        )


def _size_problem(model: nn.Module, p: Preprocessing) -> str:
    """Return why a model cannot run on images of a size, or "" if it can; it runs on the meta device."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    image = torch.empty(1, p.in_chans, p.img_size, p.img_size, device="meta")
    try:
        with torch.no_grad():
            functional_call(model, shapes, (image,))
    except Exception as error:  # each family checks in its own way, or not at all
        return str(error) or type(error).__name__
    return ""


def _with_act(loaded: LoadedModel, act: str) -> tuple[LoadedModel, str]:
    old = loaded.model
    if type(old) is not ConvMixer:
        raise RequestError(f"only a ConvMixer's activation can be changed, not that of {type(old).__name__}")
    args = args_of(old) | {"act": act}
    with torch.device("meta"):
        model = ConvMixer(in_chans=old.in_chans, num_classes=old.num_classes, **args)
    model.load_state_dict(old.state_dict(), assign=True)
    metadata = loaded.metadata | {"name": free_name(args), "model_args": args}
    return replace(loaded, model=model.eval(), metadata=metadata), old.act


def guess_preprocessing(args: Mapping[str, Any]) -> Preprocessing:
    """Return the most likely preprocessing of weights that do not store it.

    Args:
        args: Arguments of `ConvMixer`. Patches of up to 4 px mean CIFAR's images, larger ones ImageNet's.

    Source: locuslab/convmixer-cifar10 and the evaluation of locuslab/convmixer.
    """
    small = args["patch_size"] <= 4
    colours = (CIFAR_MEAN, CIFAR_STD) if small else (IMAGENET_MEAN, IMAGENET_STD)
    size, crop = (32, 1.0) if small else (224, 0.96)
    grey = args["in_chans"] == 1
    mean, std = (tuple([sum(c) / 3] if grey else c) for c in colours)
    try:
        return Preprocessing(size, args["in_chans"], mean, std, "bicubic", crop)
    except ValueError as error:
        raise RequestError(f"no preprocessing for these weights: {error}") from error


def class_names(num_classes: int) -> tuple[str, ...]:
    """Return names for weights that have none: ImageNet's for 1000 classes, else "0", "1", ..."""
    if num_classes != 1000:
        return tuple(str(index) for index in range(num_classes))
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    names = [info.index_to_description(index) for index in range(num_classes)]
    ids = [info.index_to_label_name(index) for index in range(num_classes)]
    return tuple(n if names.count(n) == 1 else f"{n} ({i})" for n, i in zip(names, ids, strict=True))


def _hub_id(name: str) -> str:
    """Return the hub repository that a name stands for.

    Raises:
        RequestError: No weights of that name are known.
    """
    plain = name.removeprefix("hf-hub:").removeprefix("hf_hub:")
    if _is_path(plain):
        raise RequestError(f"{name} does not exist")
    if "/" in plain:
        return plain
    base = plain.removesuffix(".in1k")
    if base in TIMM_NAMES or base in TIMM_NAMES.values():
        return f"timm/{TIMM_NAMES.get(base, base)}.in1k"
    import timm

    if base in VARIANTS or not timm.models.is_model_pretrained(plain):
        known = [*shipped(), *TIMM_NAMES]
        raise RequestError(f"{unknown('weights', name, known)} (not a file, a run folder or released weights)")
    config = timm.models.get_pretrained_cfg(plain)
    return str(config and config.hf_hub_id)


def _is_path(name: str) -> bool:
    """Return whether a name that does not exist looks like a path, and not like OWNER/NAME on the hub."""
    beside = Path(name).parent
    known = Path(name).suffix in (".safetensors", ".pth", ".pt", ".tar", ".bin", ".ckpt")
    return known or name.startswith((".", "/", "~")) or name.count("/") > 1 or (beside != Path() and beside.is_dir())


def _download(hub_id: str) -> Path:
    """Return the folder in the hub's cache with a repository's config and weights, downloaded if they are missing."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError, get_session

    def fetch(offline: bool) -> Path:
        hf_hub_download(hub_id, MODEL_CONFIG, local_files_only=offline)
        try:
            return Path(hf_hub_download(hub_id, MODEL, local_files_only=offline)).parent
        except EntryNotFoundError:
            return Path(hf_hub_download(hub_id, OLD_MODEL, local_files_only=offline)).parent

    try:
        return fetch(offline=True)
    except LocalEntryNotFoundError:
        pass
    except ValueError as error:
        raise RequestError(f"{hub_id} is not a name on the Hugging Face hub: {error}") from error
    try:
        get_session().head(constants.ENDPOINT, timeout=10)  # without it the client retries for half a minute
        return fetch(offline=False)
    except Exception as error:  # the hub's client raises many types
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise RequestError(
            f"cannot get {hub_id} from the Hugging Face hub ({reason}). Go online, check the name, or give a local "
            f"file; shipped with the package: {', '.join(shipped()) or 'none'}"
        ) from error
