"""ConvMixer in plain PyTorch: the reference for all kernels. Names and sizes are in registry.py."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from convmixer.errors import RequestError, unknown
from convmixer.models.layers import DepthwiseConv2d, Residual, activation, activation_name, norm_maker


class ConvMixer(nn.Module):
    """Patch embedding, `depth` equal blocks at constant resolution, average pool, linear classifier.

    BatchNorm follows the activation, so it cannot be folded into the convolution before it. State-dict keys are
    those of timm's ConvMixer, and so is the interface (`forward_features`, `reset_classifier`, ...).

    Args:
        dim: Width, the paper's h.
        depth: Number of blocks, the paper's d.
        kernel_size: Depthwise kernel, the paper's k; odd or even.
        patch_size: Side of a patch in pixels and stride of the patch embedding, the paper's p.
        in_chans: Channels of the image.
        num_classes: Outputs; 0: the model returns the pooled features.
        act: "gelu" as in the paper, or "relu" as in the authors' 768/32 weights.
        drop_rate: Dropout before the classifier, 0 to 1; the paper has none.
        global_pool: "avg" as in the paper, "max", or "" for features (B, dim, h, w); num_classes is then 0.
        act_layer: The same as `act` in timm's interface: `nn.GELU`, `nn.ReLU` or a name.
        norm_layer: The norm to use instead of `nn.BatchNorm2d`: a class or function of the number of channels, or one
            of timm's names, e.g. "layernorm2d". The kernels support only BatchNorm.
        device, dtype: Device and dtype of the parameters.

    Raises:
        RequestError: A size is out of range, or the activation, norm or pooling is not known.

    Source: arXiv 2201.09792, Sec. 2, Eq. 1 to 3 and the listing in its appendix.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        kernel_size: int = 9,
        patch_size: int = 7,
        in_chans: int = 3,
        num_classes: int = 1000,
        act: str = "gelu",
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        act_layer: str | type[nn.Module] | None = None,
        norm_layer: str | Callable[..., nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        act = act if act_layer is None else activation_name(act_layer)
        self.norm_layer, norm = norm_maker(norm_layer)
        given = {"device": device, "dtype": dtype}.items()
        where: Any = {name: value for name, value in given if value is not None}  # not every norm takes them
        if min(dim, depth, kernel_size, patch_size, in_chans) < 1 or num_classes < 0:
            sizes = f"{dim=} {depth=} {kernel_size=} {patch_size=} {in_chans=} {num_classes=}"
            raise RequestError(f"ConvMixer sizes must be positive: {sizes}")
        self.dim, self.depth, self.kernel_size, self.patch_size = dim, depth, kernel_size, patch_size
        self.in_chans, self.num_classes, self.act = in_chans, num_classes, act
        self.num_features = self.head_hidden_size = dim
        self.grad_checkpointing = False
        self.feature_info = [{"num_chs": dim, "reduction": patch_size, "module": f"blocks.{i}"} for i in range(depth)]

        def act_norm() -> list[nn.Module]:
            return [activation(act), norm(dim, **where)]

        self.stem = nn.Sequential(nn.Conv2d(in_chans, dim, patch_size, stride=patch_size, **where), *act_norm())
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(
                    Residual(nn.Sequential(DepthwiseConv2d(dim, kernel_size, **where), *act_norm())),
                    nn.Conv2d(dim, dim, 1, **where),
                    *act_norm(),
                )
                for _ in range(depth)
            )
        )
        self.head_drop = nn.Dropout(drop_rate)
        self.global_pool = _pool(global_pool, num_classes)
        self.head: nn.Module = nn.Linear(dim, num_classes, **where) if num_classes else nn.Identity()

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) -> (B, dim, H // patch_size, W // patch_size)."""
        x = self.stem(x)
        for block in self.blocks:
            if torch.jit.is_scripting():  # noqa: SIM108  an if statement: TorchScript then skips the other branch
                x = block(x)
            else:
                x = self._run(block, x)
        return x

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """(B, dim, h, w) -> (B, num_classes), or the pooled features (B, dim) with `pre_logits`."""
        if self.global_pool == "avg":
            x = x.mean((2, 3))
        elif self.global_pool == "max":
            x = x.amax((2, 3))
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) -> (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the features of chosen blocks, for dense tasks (timm's `features_only`).

        Args:
            x: Images, (B, in_chans, H, W).
            indices: An int n: the last n blocks. A sequence: the blocks of these numbers, negative ones counted from
                the end. None: all.
            norm: Accepted for timm's interface; there is no final norm to apply.
            stop_early: Do not run the blocks after the last chosen one.
            output_fmt: Only "NCHW".
            intermediates_only: Return only the list, without the final features.

        Returns:
            The final features, and a list of features (B, dim, h, w) of the chosen blocks in order; or only the list.

        Raises:
            RequestError: An index is out of range, there is none, or the format is not NCHW.
        """
        if output_fmt != "NCHW":
            raise RequestError(f"output_fmt must be 'NCHW', not {output_fmt!r}")
        take = sorted(set(self._indices(indices)))
        x, intermediates = self._intermediates(x, take, max(take) + 1 if stop_early else len(self.blocks))
        return intermediates if intermediates_only else (x, intermediates)

    @torch.jit.ignore
    def _intermediates(self, x: torch.Tensor, take: list[int], depth: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the features of the first `depth` blocks, and those after each block in `take`."""
        x, intermediates = self.stem(x), []
        for i, block in enumerate(self.blocks[:depth]):
            x = self._run(block, x)
            if i in take:
                intermediates.append(x)
        return x, intermediates

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the classifier layer."""
        return self.head

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier with a new one.

        Args:
            num_classes: Outputs; 0: the model returns the pooled features.
            global_pool: See the class; None: unchanged.

        Raises:
            RequestError: The pooling is not known, or there is a classifier but no pooling.
        """
        weight = next(self.parameters())
        self.global_pool = _pool(self.global_pool if global_pool is None else global_pool, num_classes)
        self.num_classes = num_classes
        self.head = nn.Linear(self.dim, num_classes) if num_classes else nn.Identity()
        self.head.to(weight.device, weight.dtype).train(self.training)

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last chosen one, and return the indices of the chosen blocks.

        Args:
            indices: See `forward_intermediates`.
            prune_norm: Accepted for timm's interface; there is no final norm.
            prune_head: Drop pooling and classifier too.

        Raises:
            RequestError: An index is out of range.
        """
        take = self._indices(indices)
        self.blocks = self.blocks[: max(take) + 1]
        self.depth = len(self.blocks)
        self.feature_info = self.feature_info[: self.depth]
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def _indices(self, indices: int | Sequence[int] | None) -> list[int]:
        """Return the numbers of the chosen blocks, counted from 0."""
        last_n = range(self.depth - indices, self.depth) if isinstance(indices, int) else indices
        wanted = list(range(self.depth) if last_n is None else last_n)
        if not wanted:
            raise RequestError(f"indices {indices!r} ask for no block")
        if any(not -self.depth <= i < self.depth for i in wanted):
            raise RequestError(f"indices {indices} are out of range for {self.depth} blocks")
        return [i % self.depth for i in wanted]

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Return timm's parameter groups by depth, for layer-wise learning rates."""
        return {"stem": r"^stem", "blocks": r"^blocks\.(\d+)"}

    def _run(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            y: torch.Tensor = checkpoint(block, x, use_reentrant=False)
            return y
        out: torch.Tensor = block(x)
        return out


def _pool(name: str, num_classes: int) -> str:
    if name not in ("avg", "max", ""):
        raise unknown("pooling", name, ("avg", "max", ""))
    if not name and num_classes:
        raise RequestError("without pooling there is nothing to classify: use num_classes=0 with global_pool=''")
    return name
