"""Fuzzing with atheris: `python tests/faults/fuzz.py images|forms SECONDS [CORPUS]`, or `make fuzz SECONDS=600`.

No crash, no hang (20 s an input), no growth (2 GiB): else libFuzzer ends with an error and keeps the input. What
reaches new code is added to the corpus. It runs on this machine alone, opens no socket, and stops by itself.
"""

import contextlib
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["convmixer", "PIL", "python_multipart"]):
    from convmixer.decode import load
    from convmixer.preprocess import ImageError, load_image, read_header
    from convmixer.serve.body import split_form
    from convmixer.serve.http import Refusal

HERE = Path(__file__).parent


def refuse_apart(*_: object) -> None:
    """Stand for the process that can be killed: what goes there is bounded by the kernel, and not fuzzed here."""
    raise ImageError("apart")


def images(data: bytes) -> None:
    """Read bytes as an image: pixels or an ImageError."""
    for read in (read_header, load_image):
        with contextlib.suppress(ImageError):
            read(data)


def forms(data: bytes) -> None:
    """Take bytes apart as a multipart form: no more than there is, or a Refusal."""
    try:
        form = split_form(data, "multipart/form-data; boundary=b", 32)
    except Refusal:
        return
    assert 1 <= len(form.images) <= 32
    assert sum(map(len, form.images)) < len(data)
    assert set(form.fields) <= {"topk", "explain"}


def main() -> None:
    target, seconds = sys.argv[1], int(sys.argv[2])
    corpus = Path(sys.argv[3]) if len(sys.argv) > 3 else HERE / "corpus" / target
    load.image_apart = load.header_apart = refuse_apart  # type: ignore[assignment]
    limits = [
        f"-max_total_time={seconds}",
        "-timeout=20",
        "-rss_limit_mb=2048",
        "-max_len=20000",
        "-artifact_prefix=build/",
    ]
    Path("build").mkdir(exist_ok=True)
    atheris.Setup([sys.argv[0], *limits, str(corpus)], {"images": images, "forms": forms}[target])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
