"""A trained ConvMixer on a GPU: two or three launches per block, and one CUDA graph per batch shape."""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from convmixer.fast.graphs import Graphs
from convmixer.fast.parts import Parts
from convmixer.fast.structure import ACTS, norms_of
from convmixer.fast.support import check_images
from convmixer.kernels.cuda import blocks
from convmixer.models.convmixer import ConvMixer


class CudaInference(nn.Module):
    """Computes a ConvMixer's logits. `optimize_for_inference` makes it; it has no parameters and cannot be saved.

    Args:
        model: The model, on its device; its weights are copied.
        dtype: Dtype of activations and multiplications: float32, bfloat16 or float16.
    """

    @torch.no_grad()
    def __init__(self, model: ConvMixer, dtype: torch.dtype) -> None:
        super().__init__()
        model.eval()
        stem: Any = model.stem
        norms, conv = norms_of(model), stem[0]
        parts = Parts(norms, type(stem[1]), list(model.blocks))
        parameters = [p.detach().clone() for p in parts.parameters()]
        self.patch_size, self.in_chans, self.act = model.patch_size, model.in_chans, ACTS[type(stem[1])]
        self.num_classes, self.dtype = model.num_classes, dtype
        self.stem = conv.weight.flatten(1).to(dtype), conv.bias.to(dtype)
        self.blocks = blocks.prepare(parameters, dtype)
        self.scales = blocks.running_scales(parameters, parts.running(), norms[0].eps)[0]
        self.head = [p.detach().float().clone() for p in model.head.parameters()]
        self.graphs = Graphs(self.compute)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, num_classes), fp32."""
        check_images(x, self.in_chans)
        if min(x.shape[2:]) < self.patch_size:
            raise ValueError(f"images of {tuple(x.shape[2:])} pixels are smaller than a patch")
        with torch.inference_mode(), torch.autocast(x.device.type, enabled=False):
            x = x.to(self.dtype)
            return self.graphs(x) if x.is_cuda and len(x) else self.compute(x)

    def compute(self, images: Tensor) -> Tensor:
        """Return the same as `forward`, without a CUDA graph; the images must have the dtype of the activations."""
        B, C, H, W = images.shape
        p = self.patch_size
        h, w = H // p, W // p
        patches = images[:, :, : h * p, : w * p].reshape(B, C, h, p, w, p).permute(0, 2, 4, 1, 3, 5)
        v = F.linear(patches.reshape(B * h * w, C * p * p), *self.stem).view(B, h, w, -1)
        pooled = blocks.infer(v, self.blocks, self.scales, self.act, pool=True)
        return F.linear(pooled, *self.head) if self.head else pooled
