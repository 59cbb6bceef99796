"""The fuzzing targets: each reads bytes as an untrusted file or form, and fails unless it reads or refuses them."""

import contextlib
import io
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch._dynamo

from convmixer.decode import load
from convmixer.errors import RequestError
from convmixer.models.convmixer import ConvMixer
from convmixer.models.weights import load_model, save_model
from convmixer.preprocess import ImageError, Preprocessing, load_image, read_header
from convmixer.run_folder import MODEL, MODEL_CONFIG
from convmixer.serve.body import split_form
from convmixer.serve.http import Refusal

OLD_PICKLE, ZIP = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", b"PK"
FORBIDDEN = ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec", "os.fork")


def images(data: bytes) -> None:
    """Read bytes as an image: pixels or an ImageError."""
    for read in (read_header, load_image):
        with contextlib.suppress(ImageError):
            read(data)


def forms(data: bytes) -> None:
    """Split bytes as a multipart form: no more than there is, or a Refusal."""
    try:
        form = split_form(data, "multipart/form-data; boundary=b", 32)
    except Refusal:
        return
    assert 1 <= len(form.images) <= 32
    assert sum(map(len, form.images)) < len(data)
    assert set(form.fields) <= {"topk", "explain"}


class Weights:
    """Load bytes as weights: a finite model or a RequestError; nothing is run, written or asked of the network.

    The first bytes say what they are: a file of torch.save, an older one, a pickle to put into the newer kind (its
    checksums would stop most changes), a config to put beside good tensors, or else a .safetensors file.

    Args:
        folder: Where to write the files; the only folder that may be written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.watching = folder, False
        model = ConvMixer(8, 1, 3, 2, num_classes=2)
        save_model(
            folder, model, architecture="m", model_args={}, classes="ab", preprocessing=Preprocessing(12), data={}
        )
        load_model(folder)
        with torch.device("meta"):
            timm.create_model("resnet10t")  # imports what loading needs, before anything is watched
        sys.addaudithook(self._watch)

    def __call__(self, data: bytes) -> None:
        path = self._write(data)
        self.watching = True
        try:
            model = load_model(path).model
        except RequestError:
            return
        finally:
            self.watching = False
        assert all(value.isfinite().all() for value in model.state_dict().values())

    def _write(self, data: bytes) -> Path:
        if data.startswith(b"{"):
            (self.folder / MODEL_CONFIG).write_bytes(data)
            return self.folder / MODEL
        pickled = data.startswith((b"\x80", ZIP))
        path = self.folder / ("weights.pth" if pickled else "lone.safetensors")
        plain = not pickled or data.startswith((OLD_PICKLE, ZIP))
        path.write_bytes(data if plain else packed(data))
        return path

    def _watch(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.watching:
            return
        assert event not in FORBIDDEN, event
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            assert str(arguments[0]).startswith(str(self.folder)), arguments


def packed(pickle: bytes) -> bytes:
    """Return a file as torch.save writes it, with a pickle and four tensors of 96 numbers for it to name."""
    buffer = io.BytesIO()
    members = {"data.pkl": pickle, "version": b"3\n", "byteorder": b"little"}
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in (members | {f"data/{number}": bytes(384) for number in range(4)}).items():
            archive.writestr(f"archive/{name}", content)
    return buffer.getvalue()


def unpacked(path: Path) -> bytes:
    """Return the pickle in a file of torch.save: an input for `packed`."""
    with zipfile.ZipFile(path) as archive:
        return next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))


def refuse_apart(*_: object) -> None:
    """Stands in for the process that can be killed: the kernel limits what runs there, and it is not fuzzed here."""
    raise ImageError("apart")


def targets(folder: Path) -> dict[str, Callable[[bytes], None]]:
    """Return the targets by name; `folder` is theirs to write to."""
    torch.set_num_threads(1)
    load.image_apart = load.header_apart = refuse_apart  # type: ignore[assignment]
    return {"images": images, "forms": forms, "weights": Weights(folder)}
