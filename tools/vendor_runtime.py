"""Refresh src/convmixer/serve/vendor: ONNX Runtime Web as two files that load from a web server and from disk.

    python tools/vendor_runtime.py [VERSION]

Needs npm and the network, and the onnxruntime package for its notices; about 10 s. Writes `ort.js` (the module bundle
as a classic script, because browsers refuse modules from file://) and `ort.wasm.xz` (14 MB packed to 2.2).
"""

import lzma
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import onnxruntime

VENDOR = Path(__file__).parents[1] / "src/convmixer/serve/vendor"


def main(version: str = "1.30.0") -> None:
    """Fetch one version and write the folder."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", "--silent", f"onnxruntime-web@{version}"]
        name = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.split()[-1]
        with tarfile.open(Path(folder, name)) as archive:
            dist = {
                member: archive.extractfile(f"package/dist/{member}").read()  # type: ignore[union-attr]
                for member in ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
            }
    VENDOR.mkdir(exist_ok=True)
    (VENDOR / "ort.js").write_text(as_script(dist["ort.wasm.bundle.min.mjs"].decode()), encoding="utf-8")
    packed = lzma.compress(dist["ort-wasm-simd-threaded.wasm"], preset=9 | lzma.PRESET_EXTREME)
    (VENDOR / "ort.wasm.xz").write_bytes(packed)
    for notice in ("LICENSE", "ThirdPartyNotices.txt"):
        shutil.copy(Path(onnxruntime.__file__).parent / notice, VENDOR / notice)


def as_script(module: str) -> str:
    """Return an ES module as a classic script that sets the global `ort`."""
    exports = re.search(r"export\{([^}]*)\};", module)
    if not exports:
        raise SystemExit("the bundle has no export list: look at how it changed")
    names = dict(part.split(" as ")[::-1] for part in exports[1].split(","))
    wanted = ",".join(f"{name}:{names[name]}" for name in ("InferenceSession", "Tensor", "env"))
    body = module[: exports.start()].replace("import.meta.url", "document.baseURI")
    return f'(()=>{{"use strict";{body}globalThis.ort={{{wanted}}};}})();\n'


if __name__ == "__main__":
    main(*sys.argv[1:])
