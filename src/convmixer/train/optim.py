"""The optimizer and its parameter groups: AdamW by default, or any optimizer that timm knows."""

from typing import Any

import torch
import torch.nn as nn

from convmixer.config import Config
from convmixer.errors import RequestError, unknown
from convmixer.train.freeze import layers_of

MUON_EPS = 1e-7  # guards the division by the norm of a matrix; `eps` is AdamW's
# Parameters of these parts are not hidden matrices: AdamW updates them, as Muon's author does.
ENDS = ("stem.", "head.", "patch_embed.", "pos_embed", "cls_token", "classifier.", "fc.", "conv1.")


def parameter_groups(model: nn.Module, config: Config) -> list[dict[str, Any]]:
    """Return the parameters in groups with the same weight decay, learning-rate factor and update rule.

    No weight decay: biases, the scales and shifts of norms (also if stored as (1, 1, dim)), and the parameters that
    the model lists in timm's `no_weight_decay()`, such as position embeddings. The timm fork that trained the paper's
    ImageNet models does the same. With `decay_norm_and_bias` everything is decayed, as in the authors' CIFAR-10
    script. With `layer_decay`, a parameter that is i layers below the last one learns at `lr * layer_decay ** i`; the
    group's "lr_scale" holds that factor. With Muon, vectors, the stem and the classifier have "use_fallback": AdamW
    updates them.
    """
    listed = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()  # type: ignore[operator]
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    scales = layer_scales(model, config.layer_decay)
    groups: dict[tuple[bool, float, bool], dict[str, Any]] = {}
    for name, p in named:
        spared = (_is_vector(p) or name in listed) and not config.decay_norm_and_bias
        key = (spared, scales.get(name, 1.0), is_muon(config) and (_is_vector(p) or name.startswith(ENDS)))
        group = groups.setdefault(key, {"params": [], "weight_decay": 0.0 if spared else config.weight_decay})
        group["params"].append(p)
    for (_, scale, fallback), group in groups.items():
        group |= {"lr_scale": scale} | ({"use_fallback": fallback} if is_muon(config) else {})
        group["eps"] = MUON_EPS if is_muon(config) and not fallback else config.eps
    return [groups[key] for key in sorted(groups, key=lambda key: (key[0], -key[1], key[2]))]


def layer_scales(model: nn.Module, decay: float) -> dict[str, float]:
    """Return the factor on the learning rate for each parameter, by name; empty if `decay` is 1.

    Raises:
        RequestError: The model does not give the order of its layers.

    Source: layer-wise decay as in timm's `param_groups_layer_decay`; timm's own groups do not know Muon.
    """
    if decay == 1:
        return {}
    layers = layers_of(model, "layer_decay")
    last = max(layers.values())
    return {name: decay ** (last - layer) for name, layer in layers.items()}


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group, times the group's factor."""
    for group in optimizer.param_groups:
        value = rate * group.get("lr_scale", 1.0)
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value


def is_muon(config: Config) -> bool:
    """Return whether the optimizer updates matrices by Muon and the rest by AdamW."""
    return config.optimizer.endswith("muon")


def check_optimizer(config: Config) -> None:
    """Check that the optimizer exists and needs only first derivatives.

    Raises:
        RequestError: It is unknown (the nearest name is suggested), or needs more.
    """
    from timm.optim import get_optimizer_info, list_optimizers

    # timm only wraps these: they need another package and a GPU
    names = [str(name) for name in list_optimizers(exclude_filters=["bnb*", "fused*"])]
    if config.optimizer not in names:
        raise unknown("optimizer", config.optimizer, names)
    if get_optimizer_info(config.optimizer).second_order:
        raise RequestError(f"optimizer {config.optimizer} needs second derivatives: choose a first-order one")


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Return the optimizer over `parameter_groups`; its learning rate is set before every step.

    AdamW is torch's fused version, which updates all parameters in one pass. fp16 needs the plain version, because
    gradients are unscaled and clipped before it runs. All other optimizers are timm's.

    Raises:
        RequestError: The optimizer is not known.

    Source: arXiv 2201.09792, Sec. 3 (AdamW, gradient norm clipping); eps 1e-3: the authors' ImageNet command.
        Muon: github.com/KellerJordan/Muon.
    """
    check_optimizer(config)
    groups = parameter_groups(model, config)
    if config.optimizer == "adamw":
        fused = config.precision != "fp16"
        on_gpu = fused and next(model.parameters()).is_cuda
        options: dict[str, Any] = {"betas": config.betas, "eps": config.eps, "fused": fused, "capturable": on_gpu}
        if on_gpu:  # a CUDA graph reads the rate at every replay
            for group in groups:
                group["lr"] = torch.tensor(config.lr, device=next(model.parameters()).device)
        return torch.optim.AdamW(groups, lr=config.lr, **options)
    from timm.optim import create_optimizer_v2, get_optimizer_info

    extra: dict[str, Any] = {"fallback_lr_scale": config.fallback_lr_scale} if is_muon(config) else {}
    extra |= {"betas": config.betas} if get_optimizer_info(config.optimizer).num_betas == 2 else {}
    return create_optimizer_v2(groups, config.optimizer, config.lr, momentum=config.momentum, **extra)


def _is_vector(p: torch.Tensor) -> bool:
    return p.ndim <= 1 or (p.ndim == 3 and p.numel() == p.shape[2])  # (1, 1, dim): ResMLP's
