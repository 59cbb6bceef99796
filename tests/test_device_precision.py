"""tf32 must be chosen explicitly: fp32 never uses it, and only GPUs have it."""

import pytest
import torch

from convmixer.device import choose_precision
from convmixer.errors import RequestError
from convmixer.info import info


def test_tf32_needs_a_gpu() -> None:
    for device in (None, torch.device("cpu")):
        with pytest.raises(RequestError, match="GPU"):
            choose_precision("tf32", device)


def test_tf32_is_on_for_no_other_precision() -> None:
    gpu, matmul = torch.device("cuda"), torch.backends.cuda.matmul
    before = matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        for name, allowed in (("tf32", True), ("fp32", False), ("tf32", True), ("bf16", False)):
            assert choose_precision(name, gpu) == name
            assert matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is allowed
    finally:
        matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_info_says_why_a_gpu_has_no_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    assert info()["gpu_kernels"]["why_not"] == "there is no CUDA device"
    assert "no CUDA device" in capsys.readouterr().out
