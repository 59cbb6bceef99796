"""The optimiser and its parameter groups."""

from typing import Any

import torch
import torch.nn as nn

from convmixer.config import Config


def parameter_groups(model: nn.Module, config: Config) -> list[dict[str, Any]]:
    """Return the parameters in two groups: with weight decay, and without.

    Biases, the scales and shifts of norms (vectors, whatever their shape) and what the model lists in timm's
    `no_weight_decay()` (embeddings of positions) are not decayed, as in timm's fork that trained the paper's ImageNet
    models. `decay_norm_and_bias` decays all, as the authors' CIFAR-10 script does.
    """
    listed = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()  # type: ignore[operator]
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            vector = p.ndim <= 1 or (p.ndim == 3 and p.numel() == p.shape[2])  # (1, 1, dim): ResMLP's
            spared = (vector or name in listed) and not config.decay_norm_and_bias
            (others if spared else decayed).append(p)
    groups = ({"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.AdamW:
    """Return AdamW over `parameter_groups`; its learning rate is set anew before every step.

    The fused form is one pass over all parameters. fp16 needs the plain one: gradients are unscaled and clipped
    outside of it.

    Source: arXiv 2201.09792, Sec. 3 (AdamW, gradient norm clipping); eps 1e-3: the authors' ImageNet command.
    """
    groups = parameter_groups(model, config)
    fused = config.precision != "fp16"
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)
