"""The command line: parses arguments, calls the modules that do the work, and reports errors.

Every command returns a dict of plain JSON types. The exit status is 0 if the work was done, 1 if it failed, 2 if
the request was wrong, 130 after Ctrl-C, and 128 plus the number of another signal. Heavy imports happen inside the
command that needs them, so that `--help` answers at once.
"""

import argparse
import dataclasses
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convmixer._version import __version__
from convmixer.config import Config, field_types, override
from convmixer.errors import Failed, RequestError, unknown
from convmixer.exported.formats import FORMATS, PRECISIONS
from convmixer.processes import own_start
from convmixer.run_folder import RECORD, STUDY_RECORDS, is_run

if TYPE_CHECKING:
    from convmixer.data.options import Options

IMPORTED = time.time()  # before the heavy imports, which a time budget includes
SHIPPED = "convmixer_256_8.cifar10"  # the weights inside the package

Command = Callable[[argparse.Namespace], dict[str, Any]]


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # file and class names may not be encodable here
    parser = _parser()
    args, extra = parser.parse_known_args(argv)
    args.started = own_start(IMPORTED) if argv is None else time.time()
    if extra:
        return _fail(args, _unexpected(parser, args.command, extra[0]), 2)
    try:
        result = args.handler(args)
    except RequestError as error:
        return _fail(args, error, 2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader closed the pipe
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        return _fail(args, error, 1)
    if args.json:
        print(json.dumps(_finite(result)), flush=True)
    return 1 if result.get("failed") else 0  # a study with failed runs still writes its report


def _finite(value: Any) -> Any:
    """Return a result with None in place of numbers that are not finite, which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _fail(args: argparse.Namespace, error: Exception, status: int) -> int:
    if args.debug:
        raise error
    from convmixer.text import terminal

    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    said = isinstance(error, (RequestError, Failed, OSError, FloatingPointError))
    prefix = "" if said else f"{type(error).__name__}: "
    print(f"convmixer {args.command}: {prefix}{terminal(text)}", file=sys.stderr)
    return status


def _unexpected(parser: argparse.ArgumentParser, command: str, text: str) -> RequestError:
    """Return the error for an argument that the command does not have, with the nearest flag that it has."""
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    if not text.startswith("-"):
        return RequestError(f"unexpected argument {text!r}: see convmixer {command} --help")
    return unknown("option", text.partition("=")[0], commands.choices[command]._option_string_actions)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors suggest the nearest choice: a command, a format, a precision."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            kind = "command" if isinstance(action, argparse._SubParsersAction) else "value"
            raise argparse.ArgumentError(action, str(unknown(kind, str(value), map(str, action.choices))))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="convmixer", description="Train, evaluate, compare and deploy ConvMixer image classifiers.")
    parser.add_argument("--version", action="version", version=f"convmixer {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Command, doc: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=doc, description=doc, allow_abbrev=False)
        sub.add_argument("--json", action="store_true", help="print one JSON object as the last line (null for NaN)")
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.set_defaults(handler=run)
        return sub

    _add_train(add("train", _train, "train a model and write a run folder"))
    _add_val(add("val", _val, "measure accuracy and calibration on a split"))
    _add_predict(add("predict", _predict, "classify images and videos"))
    _add_data(add("data", _data, "show what a data set holds, with a picture of its classes"))
    _add_plan(add("plan", _plan, "estimate parameters, MACs, memory and time before training"))
    _add_recalibrate(add("recalibrate", _recalibrate, "recompute BatchNorm statistics of a run or weights"))
    _add_benchmark(add("benchmark", _benchmark, "measure speed and memory against other runtimes"))
    _add_export(add("export", _export, "write an ONNX, OpenVINO or torch.export file, or a web page"))
    _add_convert(add("convert", _convert, "write weights in our format, with other sizes or classes"))
    _add_explain(add("explain", _explain, "draw what a model looks at in an image"))
    _add_plot(add("plot", _plot, "draw what a model has learned"))
    _add_serve(add("serve", _serve, "serve one model as a web page and an HTTP API"))
    _add_compare(add("compare", _compare, "run a study with verdicts, or compare your own runs"))
    _add_tune(add("tune", _tune, "search hyperparameters on a validation split, and write them for train --config"))
    _add_verify(add("verify", _verify, "re-evaluate a recorded number from its weights and data"))
    _add_models(add("models", _models, "list the models"))
    add("info", _info, "show versions, devices and whether the kernels are built")
    return parser


def _add_settings(sub: argparse.ArgumentParser) -> None:
    """Add a flag for every setting; flags that are not given are not in the namespace."""
    sub.add_argument(
        "--recipe", help="a recipe's name, see docs/recipes.md; default: digits for digits, else finetune"
    )
    sub.add_argument("--config", type=Path, help="YAML file of settings, applied over the recipe")
    group = sub.add_argument_group("settings (defaults < recipe < --config < these flags)")
    _add_fields(group, [field.name for field in dataclasses.fields(Config)])


def _add_fields(group: argparse._ActionsContainer, names: Sequence[str]) -> None:
    for field in (field for field in dataclasses.fields(Config) if field.name in names):
        flag = "--" + field.name.replace("_", "-")
        doc = field.metadata["doc"].replace("%", "%%")
        if field.metadata["choices"]:
            doc += f" ({', '.join(field.metadata['choices'])})"
        alone: dict[str, Any] = {}
        if field.metadata["alone"]:
            alone = {"nargs": "?", "const": field.metadata["alone"]}
        metavar = _metavar(field.name)
        group.add_argument(
            flag, dest=f"set_{field.name}", default=argparse.SUPPRESS, metavar=metavar, help=doc, **alone
        )


def _metavar(name: str) -> str:
    text = str(field_types()[name])
    return (
        "A,B" if "tuple" in text else "BOOL" if "bool" in text else "N" if "int" in text or "float" in text else "X"
    )


def _settings(args: argparse.Namespace) -> tuple[str, Config, Config]:
    """Return the recipe's name, its settings and the resolved ones."""
    from convmixer.recipes import load_recipe, load_settings

    name = args.recipe or ("digits" if args.data == "digits" else "finetune")
    recipe = load_recipe(name)
    from_file = load_settings(args.config) if args.config else {}
    return name, recipe, override(override(recipe, from_file), _flags(args))


def _flags(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that were given as flags."""
    return {key.removeprefix("set_"): value for key, value in vars(args).items() if key.startswith("set_")}


_READING = ("path_column", "label_column", "split_column", "image_root", "group")


def _add_reading(sub: argparse.ArgumentParser) -> None:
    """Add the flags that say how to read data whose columns, folders or groups cannot be found automatically."""
    _add_fields(sub.add_argument_group("how to read the data, see docs/data.md"), _READING)


def _reading(args: argparse.Namespace) -> "Options":
    """Return the flags of `_add_reading` that were given."""
    from convmixer.data.options import Options

    return Options.of(override(Config(), {name: text for name, text in _flags(args).items() if name in _READING}))


# Each command below: its arguments, then its call.


def _add_train(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("data", nargs="?", help="data set, see docs/data.md (default: digits)")
    sub.add_argument("--out", type=Path, help="run folder (default: runs/<recipe>-<number>)")
    sub.add_argument(
        "--resume", type=Path, metavar="RUN", help="continue the run in this folder; give DATA if its data have moved"
    )
    sub.add_argument(
        "--find-lr",
        action="store_true",
        help="train no model: draw the loss over 100 steps with a growing learning rate, and suggest --lr",
    )
    _add_settings(sub)


def _train(args: argparse.Namespace) -> dict[str, Any]:
    from convmixer.train.run import CHANGEABLE, resume, train

    if args.resume:
        flags = {key.removeprefix("set_"): value for key, value in vars(args).items() if key.startswith("set_")}
        given = ["--" + key.replace("_", "-") for key in flags if key not in CHANGEABLE]
        given += [f"--{key}" for key in ("recipe", "config", "out") if getattr(args, key) is not None]
        given += ["--find-lr"] * args.find_lr
        if given:
            raise RequestError(
                f"--resume continues with the settings of {args.resume}: leave out {' and '.join(given)}"
            )
        return resume(args.resume, args.data, changes=flags, started=args.started)
    args.data = args.data or "digits"
    name, recipe, config = _settings(args)
    if args.find_lr:
        from convmixer.train.find_lr import find_lr

        return find_lr(args.data, config, args.out, f"{name}-lr")
    return train(args.data, config, out=args.out, recipe=recipe, recipe_name=name, started=args.started)


def _add_meaning(sub: argparse.ArgumentParser) -> None:
    """Add the flags that describe the input a model expects.

    Needed for weights that do not store this; in weights that do, the flags override it.
    """
    group = sub.add_argument_group(
        "input that the model expects (default: as stored with the weights, else a guess, which is printed)"
    )
    group.add_argument("--img-size", type=int, metavar="S", help="side of the input in pixels")
    group.add_argument("--mean", type=_numbers, metavar="A,B,C", help="mean of each channel, of values from 0 to 1")
    group.add_argument("--std", type=_numbers, metavar="A,B,C", help="standard deviation of each channel")
    group.add_argument("--crop-pct", type=float, metavar="X", help="share of the image that the centre crop keeps")
    group.add_argument("--interpolation", choices=("bicubic", "bilinear", "nearest"), help="filter for resizing")
    group.add_argument("--act", choices=("gelu", "relu"), help="activation function, if the weights do not store it")


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers separated by commas, not {text!r}") from None


def _meaning(args: argparse.Namespace) -> dict[str, Any]:
    """Return the flags of `_add_meaning` that were given."""
    names = ("img_size", "mean", "std", "crop_pct", "interpolation", "act")
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def _add_val(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("weights", help="run folder, weights folder or file, exported file, or name")
    sub.add_argument("data", nargs="?", help="data set (default: the run's own)")
    sub.add_argument(
        "--split",
        choices=("train", "val", "test"),
        help="default: test; if DATA are not the training data, the first of test, val and train that exists",
    )
    sub.add_argument(
        "--limit", type=int, metavar="N", help="evaluate a random sample of N images (with a fixed seed)"
    )
    sub.add_argument("--batch-size", type=int, default=64)
    sub.add_argument("--precision", choices=("auto", "fp32", "tf32", "bf16", "int8"), default="auto")
    sub.add_argument("--out", type=Path, help="folder for the tables and the confusion matrix picture")
    sub.add_argument(
        "--mistakes",
        action="store_true",
        help="write a page and a table of the misclassified images and likely label errors (to --out; without "
        "--out, to the run's folder or, if DATA is given, to the current folder)",
    )
    _add_tta(sub)
    _add_reading(sub)
    _add_meaning(sub)


def _add_tta(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--tta", action="store_true", help="average each image and its mirror image (test-time augmentation)"
    )


def _val(args: argparse.Namespace) -> dict[str, Any]:
    from convmixer.evaluation.val import val

    rest = (args.split, args.limit, args.batch_size, args.precision, args.out)
    more = {"mistakes": args.mistakes, "tta": args.tta}
    return val(args.weights, args.data, *rest, expected=_meaning(args), options=_reading(args), **more)


def _add_predict(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("weights", help="run folder, weights folder or file, exported file, or name")
    sub.add_argument(
        "images",
        nargs="+",
        help="image files, folders, quoted patterns ('photos/**/*.jpg'), URLs, video files, or camera:0",
    )
    sub.add_argument("--topk", type=int, default=5)
    sub.add_argument("--batch-size", type=int, default=32)
    sub.add_argument("--precision", choices=("auto", "fp32", "tf32", "bf16"), default="auto")
    sub.add_argument("--out", type=Path, help="write all predictions to this .csv or .jsonl file")
    sub.add_argument(
        "--draw",
        type=Path,
        metavar="PATH",
        help="draw the labels: a folder for pictures, or a video file such as labelled.mp4 for one video",
    )
    sub.add_argument("--allow-network", action="store_true", help="fetch images whose URLs are given")
    _add_tta(sub)
    video = sub.add_argument_group("videos and cameras")
    video.add_argument(
        "--every", type=float, default=0.5, metavar="SECONDS", help="between predictions (default: 0.5)"
    )
    video.add_argument(
        "--seconds",
        type=float,
        metavar="N",
        help="stop after N seconds (default: at the end of the video; a camera runs until Ctrl-C)",
    )
    _add_meaning(sub)


def _predict(args: argparse.Namespace) -> dict[str, Any]:
    from convmixer.predict.files import Watching, predict_files

    if not 0 <= args.every < math.inf or not (args.seconds is None or 0 < args.seconds < math.inf):
        raise RequestError("--every must be at least 0, and --seconds above 0")
    return predict_files(
        args.weights,
        args.images,
        args.topk,
        args.batch_size,
        args.precision,
        args.out,
        _meaning(args),
        draw=args.draw,
        network=args.allow_network,
        watching=Watching(args.every, args.seconds),
        tta=args.tta,
    )


def _add_data(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("data", help="data set, see docs/data.md")
    sub.add_argument("--out", type=Path, metavar="FILE.png", help="the picture (default: NAME-classes.png here)")
    _add_fields(sub, (*_READING, "val_fraction", "test_fraction", "seed"))


def _data(args: argparse.Namespace) -> dict[str, Any]:
    from convmixer.data.summary import describe

    config = override(Config(), _flags(args))
    return describe(args.data, _reading(args), args.out, config.val_fraction, config.seed, config.test_fraction)


def _add_plan(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("data", nargs="?", default="digits", help="data set (default: digits)")
    _add_settings(sub)


def _plan(args: argparse.Namespace) -> dict[str, Any]:
    from convmixer.train.plan import plan

    return plan(args.data, _settings(args)[2])


def _add_recalibrate(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("weights", help="run folder or weights folder")
    sub.add_argument("data", nargs="?", help="data set (default: the run's own)")
    sub.add_argument("--out", type=Path, required=True, help="folder for the recalibrated weights")
    sub.add_argument("--limit", type=int, default=2048, metavar="N", help="training images to use (default: 2048)")
    _add_reading(sub)


def _recalibrate(args: argparse.Namespace) -> dict[str, Any]:
    from convmixer.evaluation.batchnorm import recalibrate

    return recalibrate(args.weights, args.data, args.out, args.limit, _reading(args))


def _add_benchmark(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("task", choices=("train", "infer"))
    sub.add_argument("--model", help="name of a ConvMixer; the sizes below override its own")
    for flag in ("--dim", "--depth", "--kernel-size", "--patch-size", "--img-size", "--num-classes"):
        sub.add_argument(flag, type=int, metavar="N")
    sub.add_argument("--act", choices=("gelu", "relu"))
    sub.add_argument("--batch-size", type=int, metavar="N", help="default: 64 for images of up to 64 pixels, else 4")
    sub.add_argument("--precision", choices=("fp32", "bf16", "int8"), default="bf16", help="default: bf16")
    sub.add_argument("--threads", type=int, help="default: the cores that this process may use")
    sub.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    sub.add_argument("--peers", metavar="A,B", help="other runtimes to measure; none: only ours (default: all)")
    sub.add_argument("--rounds", type=int, default=7, help="turns of each contender (default: 7)")
    sub.add_argument("--sample-seconds", type=float, default=0.3, help="minimum seconds per turn (default: 0.3)")
    sub.add_argument(
        "--compile-limit",
        type=int,
        default=300,
        metavar="SECONDS",
        help="time for a contender to compile before its first step; 0: leave out those that compile (default: 300)",
    )
    sub.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    sub.add_argument("--record", type=Path, metavar="FILE", help="append a record to this JSON-lines file")


def _benchmark(args: argparse.Namespace) -> dict[str, Any]:
    from convmixer.benchmark.case import case_of
    from convmixer.benchmark.run import benchmark

    sizes = ("dim", "depth", "kernel_size", "patch_size", "img_size", "num_classes", "act")
    overrides = {name: getattr(args, name) for name in sizes}
    rest = {"batch_size": args.batch_size, "precision": args.precision, "threads": args.threads}
    case = case_of(args.task, args.model, overrides, **rest)
    peers = None if args.peers is None else [name for name in args.peers.split(",") if name != "none"]
    seconds, limit = args.sample_seconds, args.compile_limit
    if args.device == "cuda":
        from convmixer.benchmark.gpu import benchmark_gpu

        return benchmark_gpu(case, peers, args.rounds, seconds, args.record, compile_limit=limit)
    return benchmark(case, peers, args.rounds, seconds, limit, not args.no_memory, args.record)


def _add_export(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("weights", nargs="?", default=SHIPPED, help=f"run folder, weights or name (default: {SHIPPED})")
    formats = "; ".join(f"{row.name}: {row.summary}" for row in FORMATS.values())
    sub.add_argument("--format", choices=FORMATS, default="onnx", help=f"{formats} (default: onnx)")
    sub.add_argument("--precision", choices=PRECISIONS, default="fp32", help="default: fp32")
    sub.add_argument("--out", type=Path, help="file, or folder for web (default: RUN/exports/..., or here)")
    sub.add_argument("--data", help="data set to check and calibrate on (default: that of the weights)")
    sub.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="check on N images (default: 1000; 64 if the model's input is larger than 64 pixels)",
    )
    sub.add_argument("--samples", metavar="RUN|FOLDER|none", help="pictures for the web page (default: none)")
    _add_reading(sub)
    _add_meaning(sub)


def _export(args: argparse.Namespace) -> dict[str, Any]:
    from convmixer.exported.export import export

    rest = (args.precision, args.out, args.data, args.limit, args.samples)
    return export(args.weights, args.format, *rest, expected=_meaning(args), options=_reading(args))


def _add_convert(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("weights", help="weights in any known format, run folder or name")
    sub.add_argument("--out", type=Path, required=True, help="folder for the new weights")
    sub.add_argument("--patch-size", type=int, metavar="P", help="resize the patch embedding")
    sub.add_argument("--kernel-size", type=int, metavar="K", help="resize the depthwise kernels")
    sub.add_argument("--num-classes", type=int, metavar="N", help="replace the classifier")
    sub.add_argument("--classes", metavar="A,B,...", help="names of the classes; known ones keep their weights")
    sub.add_argument("--in-chans", type=int, metavar="C", help="image channels, 1 or 3")
    sub.add_argument("--img-size", type=int, metavar="S", help="side of the input in pixels")
    sub.add_argument("--act", choices=("gelu", "relu"), help="activation function, if the weights do not store it")


def _convert(args: argparse.Namespace) -> dict[str, Any]:
    from convmixer.models.surgery import convert

    sizes = {key: getattr(args, key) for key in ("patch_size", "kernel_size", "num_classes", "in_chans", "img_size")}
    classes = args.classes.split(",") if args.classes else None
    return convert(args.weights, args.out, classes=classes, act=args.act, **sizes)


def _add_explain(sub: argparse.ArgumentParser) -> None:
    # one positional list, because the weights may be left out and the image may not
    sub.add_argument("paths", nargs="+", metavar="[WEIGHTS] IMAGE", help=f"default weights: {SHIPPED}")
    sub.add_argument("--out", type=Path, help="PNG to write (default: IMAGE-explained.png here)")
    sub.add_argument("--topk", type=int, default=5)


def _explain(args: argparse.Namespace) -> dict[str, Any]:
    from convmixer.explain import explain

    if len(args.paths) > 2:
        raise RequestError(f"explain takes one image, not {len(args.paths) - 1}")
    weights = args.paths[0] if len(args.paths) == 2 else SHIPPED
    return explain(weights, Path(args.paths[-1]), args.out, args.topk)


def _add_plot(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("weights", nargs="?", default=SHIPPED, help=f"run folder, weights or name (default: {SHIPPED})")
    sub.add_argument("--out", type=Path, help="folder for the pictures (default: RUN/pictures)")


def _plot(args: argparse.Namespace) -> dict[str, Any]:
    from convmixer.explain import plot

    return plot(args.weights, args.out)


def _add_serve(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("weights", nargs="?", default=SHIPPED, help=f"as for predict (default: {SHIPPED})")
    sub.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    sub.add_argument("--port", type=int, default=8000, help="default: 8000; 0: any free port")
    sub.add_argument("--precision", choices=("auto", "fp32", "tf32", "bf16"), default="auto")
    sub.add_argument(
        "--token-file",
        type=Path,
        help="file with the bearer token that clients must send (or set CONVMIXER_TOKEN); default: none needed",
    )
    sub.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="name that the server answers to, besides localhost, --host and IP addresses; may be repeated",
    )
    sub.add_argument(
        "--cors",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="site whose pages may use the API, such as https://example.org, or *; repeatable (default: its own)",
    )
    sub.add_argument(
        "--root-path", default="", metavar="PATH", help="URL prefix under which a proxy serves this page"
    )
    sub.add_argument("--max-body-mb", type=float, default=16, help="default: 16")
    sub.add_argument("--max-pixels", type=int, default=50_000_000, help="per image (default: 50 million)")
    sub.add_argument("--max-images", type=int, default=32, help="per request (default: 32)")
    sub.add_argument("--max-queue", type=int, default=256, help="images waiting (default: 256)")
    sub.add_argument("--batch-size", type=int, default=32, help="images computed at once (default: 32)")
    sub.add_argument("--timeout", type=float, default=30, metavar="SECONDS", help="for an answer (default: 30)")
    sub.add_argument(
        "--samples",
        metavar="RUN|FOLDER|none",
        help="pictures on the page (default: the run's own samples if only this machine can connect, else none)",
    )
    _add_meaning(sub)


def _serve(args: argparse.Namespace) -> dict[str, Any]:
    from convmixer.serve.access import Access
    from convmixer.serve.limits import Limits
    from convmixer.serve.server import read_token, serve

    body = int(args.max_body_mb * 2**20)
    limits = Limits(
        body_bytes=body,
        pixels=args.max_pixels,
        images=args.max_images,
        queue=args.max_queue,
        batch=args.batch_size,
        answer_seconds=args.timeout,
        held_bytes=max(Limits.held_bytes, body),
    )
    access = Access(
        read_token(args.token_file), tuple(args.allowed_host), tuple(args.cors), args.root_path.rstrip("/")
    )
    rest = (args.precision, access, limits, args.samples)
    return serve(args.weights, args.host, args.port, *rest, expected=_meaning(args))


def _add_compare(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "what",
        nargs="*",
        metavar="STUDY [DATA] | RUN RUN ...",
        help="a shipped study (see --list) or the path of a study file, and a data set (default: the study's own); "
        "or run folders, to put your own runs side by side",
    )
    sub.add_argument("--list", action="store_true", help="list the shipped studies")
    sub.add_argument("--out", type=Path, help="folder (default: studies/<study>; of runs: comparison)")
    sub.add_argument("--resume", action="store_true", help="continue the study in that folder")
    sub.add_argument("--budget", metavar="TIME", help="start only runs that would end within this time, such as 2h")
    sub.add_argument(
        "--reuse", type=Path, metavar="DIR", help="reuse identical runs of this study instead of training them"
    )
    sub.add_argument(
        "--against", type=Path, metavar="DIR", help="say whether the order of the arms is the same in this study"
    )
    sub.add_argument("--dry-run", action="store_true", help="probe every arm, print the plan, train nothing")
    _add_worker(sub, "study")


def _compare(args: argparse.Namespace) -> dict[str, Any]:
    if args.list:
        from convmixer.studies.schema import list_titles

        titles = list_titles()
        print("\n".join(f"{name:<12} {title}" for name, title in titles.items()))
        return {"studies": titles}
    runs = _runs_to_compare(args)
    if runs:
        from convmixer.results.comparison import compare_runs

        return compare_runs(runs, args.out)
    from convmixer.studies.run import compare

    return compare(
        args.what[0],
        args.what[1] if len(args.what) > 1 else None,
        args.out,
        resume=args.resume,
        budget=args.budget,
        dry_run=args.dry_run,
        worker=args.worker,
        storage=args.storage,
        heartbeat_seconds=args.heartbeat,
        reuse=args.reuse,
        against=args.against,
    )


def _runs_to_compare(args: argparse.Namespace) -> list[Path]:
    """Return the run folders that `compare` was given; an empty list if it was given a study.

    Raises:
        RequestError: The arguments could be both, or are neither.
    """
    from convmixer.studies.schema import list_studies

    if not args.what:
        raise RequestError("name a study (one of `convmixer compare --list`, or a study file), or two or more runs")
    runs = [is_run(name) for name in args.what]
    if runs[0] and args.what[0] in list_studies():
        name = args.what[0]
        raise RequestError(f"{name} is a shipped study and a run folder here: write ./{name} to mean the folder")
    study = args.what[0] in list_studies() or args.what[0].endswith((".yaml", ".yml"))
    if not runs[0] and len(args.what) <= 2 and (study or not any(runs)):
        return []
    if not all(runs):
        other = args.what[runs.index(False)]
        raise RequestError(f"{other} is not a run folder: name a study and data, or only runs")
    defaults = {
        "resume": False,
        "budget": None,
        "reuse": None,
        "against": None,
        "dry_run": False,
        "worker": False,
        "storage": None,
    }
    given = [f"--{name.replace('_', '-')}" for name, value in defaults.items() if getattr(args, name) != value]
    if given:
        raise RequestError(f"{', '.join(given)}: for studies only; runs are compared as they are")
    return list(map(Path, args.what))


def _add_tune(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("data", help="data set, see docs/data.md")
    sub.add_argument("--out", type=Path, help="folder for the search (default: tune/<recipe>)")
    sub.add_argument("--space", type=Path, metavar="FILE", help="YAML file of settings to search (default: shipped)")
    sub.add_argument("--trials", type=int, metavar="N", help="trials in all (default: 20 without --budget)")
    sub.add_argument("--budget", metavar="TIME", help="start only trials that would end within this time, such as 2h")
    sub.add_argument("--resume", action="store_true", help="continue the search in that folder")
    _add_worker(sub, "search")
    _add_settings(sub)


def _tune(args: argparse.Namespace) -> dict[str, Any]:
    from convmixer.tuning.run import tune

    name, _, config = _settings(args)
    return tune(
        args.data,
        config,
        name,
        args.out,
        space=args.space,
        trials=args.trials,
        budget=args.budget,
        resumes=args.resume,
        worker=args.worker,
        storage=args.storage,
        heartbeat_seconds=args.heartbeat,
    )


def _add_worker(sub: argparse.ArgumentParser, what: str) -> None:
    """Add the flags with which several processes and machines share a queue."""
    sub.add_argument("--worker", action="store_true", help=f"help with a {what} that was started elsewhere")
    sub.add_argument(
        "--storage", metavar="URL", help="queue for many machines, postgresql://... (default: SQLite in the folder)"
    )
    sub.add_argument(
        "--heartbeat", type=int, default=15, metavar="SECONDS", help="a worker silent for 8 heartbeats counts as dead"
    )


def _add_verify(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("record", type=Path, help=f"{RECORD} of a run, or {STUDY_RECORDS} of a study")
    sub.add_argument("--data", help="where the data are now (default: as recorded)")
    sub.add_argument("--run", help="verify only the record of this name")


def _verify(args: argparse.Namespace) -> dict[str, Any]:
    from convmixer.studies.verify import verify

    return verify(args.record, args.data, args.run)


def _add_models(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("pattern", nargs="?", default="convmixer*", help="shell pattern (default: convmixer*)")


def _models(args: argparse.Namespace) -> dict[str, Any]:
    from convmixer.models.registry import list_models

    names = list_models(args.pattern)
    print("\n".join(names))
    return {"models": names}


def _info(args: argparse.Namespace) -> dict[str, Any]:
    from convmixer.info import info

    return info()
