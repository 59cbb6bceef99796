"""timm's ResNet, ResMLP and MLP-Mixer at any size, to compare with ConvMixer; in timm they have fixed sizes."""

from collections.abc import Sequence
from typing import Any, cast

import torch.nn as nn

from convmixer.errors import unknown


def mlp_mixer(
    dim: int, depth: int, img_size: int = 32, patch_size: int = 4, in_chans: int = 3, num_classes: int = 10
) -> nn.Module:
    """Return timm's MLP-Mixer at any size; timm's names fix the patch size.

    Source: arXiv 2105.01601.
    """
    from timm.models.mlp_mixer import MlpMixer

    sizes: dict[str, Any] = {"img_size": img_size, "patch_size": patch_size, "num_blocks": depth, "embed_dim": dim}
    return MlpMixer(num_classes, in_chans=in_chans, **sizes)


def resmlp(
    dim: int, depth: int, img_size: int = 32, patch_size: int = 4, in_chans: int = 3, num_classes: int = 10
) -> nn.Module:
    """Return timm's ResMLP at any size; timm's names fix the patch size.

    Source: arXiv 2105.03404.
    """
    from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock

    sizes: dict[str, Any] = {"img_size": img_size, "patch_size": patch_size, "num_blocks": depth, "embed_dim": dim}
    return MlpMixer(num_classes, in_chans=in_chans, mlp_ratio=4, block_layer=ResBlock, norm_layer=Affine, **sizes)


def resnet(
    dim: int,
    layers: Sequence[int] = (2, 2, 2, 2),
    stem: str = "conv3x3",
    patch_size: int = 4,
    in_chans: int = 3,
    num_classes: int = 10,
) -> nn.Module:
    """Return timm's ResNet of basic blocks with a chosen stem; stages have dim, 2 dim, 4 dim, 8 dim channels.

    Args:
        dim: Channels of the first stage; the stem has as many, rounded up to an even number.
        layers: Blocks of each of the four stages.
        stem: "conv7x7" (for ImageNet: stride 2, then max-pooling of stride 2), "conv3x3" (stride 1, no pooling:
            usual for small images), or "patch" (patch embedding of stride `patch_size`, no pooling).
        patch_size: Stride of the patch stem.
        in_chans: Channels of the image.
        num_classes: Outputs.

    Raises:
        RequestError: The stem is not known.

    Source: arXiv 1512.03385; the patch stem is ours, for the question of locuslab/convmixer #4.
    """
    from timm.models.resnet import BasicBlock, ResNet

    stems = {"conv7x7": (7, 2, 3), "conv3x3": (3, 1, 1), "patch": (patch_size, patch_size, 0)}
    if stem not in stems:
        raise unknown("ResNet stem", stem, stems)
    channels = (dim, 2 * dim, 4 * dim, 8 * dim)
    # timm lets us choose the width of the deep stem only; its convolution is replaced below
    block: Any = BasicBlock
    model: Any = ResNet(
        block, tuple(layers), num_classes, in_chans, channels=channels, stem_type="deep", stem_width=(dim + 1) // 2
    )
    kernel, stride, padding = stems[stem]
    model.conv1 = nn.Conv2d(in_chans, model.bn1.num_features, kernel, stride, padding, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    if stem != "conv7x7":
        model.maxpool = nn.Identity()
    return cast(nn.Module, model)
