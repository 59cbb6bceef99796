"""Fuzzing with atheris: `python tests/faults/fuzz.py images|forms|weights SECONDS [CORPUS]`, or `make fuzz`.

No crash, no hang (20 s an input), no growth (2 GiB): else libFuzzer ends with an error and keeps the input. What
reaches new code is added to the corpus. It runs on this machine alone, opens no socket, and stops by itself.
`test_faults_corpus.py` reads the corpus again in every test run.
"""

import sys
import tempfile
from pathlib import Path

import atheris

LIBRARIES = ["PIL", "python_multipart", "pickletools", "zipfile", "json", "torch._weights_only_unpickler"]
with atheris.instrument_imports(include=["convmixer", *LIBRARIES]):
    from targets import targets

HERE = Path(__file__).parent


def main() -> None:
    target, seconds = sys.argv[1], int(sys.argv[2])
    corpus = Path(sys.argv[3]) if len(sys.argv) > 3 else HERE / "corpus" / target
    limits = [
        f"-max_total_time={seconds}",
        "-timeout=20",
        "-rss_limit_mb=2048",
        "-max_len=20000",
        "-artifact_prefix=build/",
    ]
    Path("build").mkdir(exist_ok=True)
    memory = Path("/dev/shm")
    folder = tempfile.mkdtemp(prefix="fuzz-", dir=memory if memory.is_dir() else None)  # a few small files
    atheris.Setup([sys.argv[0], *limits, str(corpus)], targets(Path(folder))[target])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
