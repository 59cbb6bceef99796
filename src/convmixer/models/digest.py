"""Digests in weights files, which detect a single wrong bit.

Files of other programs have no digest and are not checked.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

from convmixer.errors import RequestError

KEY = "sha256"


def digest_weights(state: Mapping[str, torch.Tensor], config: str) -> str:
    """Return the digest of tensors (names, dtypes, shapes, values) and of the config text saved with them, in hex."""
    digest = hashlib.sha256(config.encode())
    for name in sorted(state):
        tensor = state[name].contiguous()
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        values: Any = tensor.flatten().view(torch.uint8).numpy()
        digest.update(values)
    return digest.hexdigest()


def check_weights(state: Mapping[str, torch.Tensor], metadata: Mapping[str, str], source: object) -> None:
    """Check the tensors of a .safetensors file against the digest in its metadata, if it has one.

    Raises:
        RequestError: They do not match.
    """
    if KEY in metadata and digest_weights(state, metadata.get("config", "")) != metadata[KEY]:
        raise RequestError(f"{source} is damaged: its digest does not match; copy or download it again")


def with_digest(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with its own digest as the last entry."""
    return {**config, KEY: _digest_config(config)}


def check_config(config: Mapping[str, Any], source: object) -> dict[str, Any]:
    """Return a config without its digest, after checking the digest if there is one.

    Raises:
        RequestError: They do not match.
    """
    rest = {name: value for name, value in config.items() if name != KEY}
    if KEY in config and _digest_config(rest) != config[KEY]:
        raise RequestError(
            f"{source} was damaged or changed after it was written: copy it again, or if you changed it on purpose, "
            f'delete its entry "{KEY}"'
        )
    return rest


def _digest_config(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
