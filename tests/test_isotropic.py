"""Models for comparisons: the default is exactly ConvMixer, and each part can be replaced separately."""

import pytest
import torch

from convmixer.errors import RequestError
from convmixer.fast import accelerate, optimize_for_inference
from convmixer.models.convmixer import ConvMixer
from convmixer.models.create import create_model
from convmixer.models.isotropic import MIXERS, RESIDUALS, STEMS, AveragePooling, Isotropic
from convmixer.models.peers import resnet
from convmixer.models.registry import SKELETONS

SIZES = {"dim": 16, "depth": 2, "kernel_size": 3, "patch_size": 4, "img_size": 16, "num_classes": 5}


def test_default_is_convmixer() -> None:
    torch.manual_seed(0)
    model, reference = Isotropic(**SIZES).eval(), ConvMixer(16, 2, 3, 4, num_classes=5).eval()
    reference.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model(x), reference(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    "options",
    [{"mixer": m} for m in MIXERS]
    + [{"stem": s} for s in STEMS]
    + [{"residual": r} for r in RESIDUALS]
    + [{"norm": "layer"}, {"act": "relu"}],
    ids=str,
)
def test_every_variant_trains_and_is_independent_of_the_batch(options: dict[str, str]) -> None:
    torch.manual_seed(0)
    model = Isotropic(**SIZES, **options)
    x = torch.randn(3, 3, 16, 16)
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    torch.testing.assert_close(model(x)[:1], model(x[:1]))


@pytest.mark.parametrize(
    "options",
    [{"mixer": m} for m in MIXERS] + [{"stem": s} for s in STEMS] + [{"residual": r} for r in RESIDUALS],
    ids=str,
)
def test_every_variant_can_be_made_fast_or_stays_as_it_is(options: dict[str, str]) -> None:
    torch.manual_seed(0)
    model, x = Isotropic(**SIZES, **options).eval(), torch.randn(3, 3, 16, 16)
    expected = model(x)
    torch.testing.assert_close(optimize_for_inference(model, "fp32")(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(accelerate(model)(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mixer", MIXERS)
def test_exports_with_any_batch(mixer: str) -> None:
    torch.manual_seed(0)
    model, x = Isotropic(**SIZES, mixer=mixer).eval(), torch.randn(3, 3, 16, 16)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (x[:2],), dynamic_shapes=({0: batch},)).module()
    torch.testing.assert_close(exported(x), model(x))


@pytest.mark.parametrize("mixer", MIXERS)
def test_only_the_mixer_changes(mixer: str) -> None:
    mixers = {name for name, _ in Isotropic(**SIZES, mixer=mixer).named_parameters() if ".fn.0." in name}
    rest = {name for name, _ in Isotropic(**SIZES, mixer=mixer).named_parameters()} - mixers
    plain = {name for name, _ in ConvMixer(16, 2, 3, 4, num_classes=5).named_parameters() if ".fn.0." not in name}
    assert rest == plain
    assert bool(mixers) == (mixer not in ("pool", "none"))


@pytest.mark.parametrize("stem", STEMS)
def test_stems_keep_the_grid(stem: str) -> None:
    features = Isotropic(**SIZES, stem=stem).eval().forward_features(torch.randn(1, 3, 16, 16))
    assert features.shape[-1] == (16 if stem == "stride1" else 4)


def test_mixers_see_as_far_as_they_should() -> None:
    """A change in one corner reaches the opposite one through global mixers in a block, and never through `none`."""
    reach = {}
    for mixer in MIXERS:
        torch.manual_seed(0)
        model = Isotropic(**(SIZES | {"depth": 1, "img_size": 32}), mixer=mixer).eval()
        x = torch.randn(1, 3, 32, 32)
        changed = x.clone()
        changed[..., :4, :4] += 1
        difference = (model.forward_features(x) - model.forward_features(changed)).abs().amax((0, 1))  # (8, 8)
        reach[mixer] = int((difference > 0).sum())
    assert reach == {"depthwise": 4, "attention": 64, "token-mlp": 64, "linear": 64, "pool": 4, "none": 1}


def test_attention_tells_positions_apart() -> None:
    torch.manual_seed(0)
    mixer = Isotropic(**SIZES, mixer="attention").blocks[0][0].fn[0]
    torch.nn.init.normal_(mixer.bias)
    x = torch.randn(1, 16, 4, 4)
    moved = mixer(x.flip(-1)).flip(-1)
    assert not torch.allclose(moved, mixer(x), atol=1e-3)


@pytest.mark.parametrize("window", [1, 3, 5, 13])
def test_pooling_equals_torch(window: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6)
    pool = torch.nn.AvgPool2d(window, 1, window // 2, count_include_pad=False)
    torch.testing.assert_close(AveragePooling(6, window)(x), pool(x))


@pytest.mark.parametrize("name", SKELETONS)
def test_skeletons_by_name(name: str) -> None:
    model = create_model(name, num_classes=7, dim=16, **({} if name == "resnet" else {"depth": 2}))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    with pytest.raises(RequestError, match="no_such"):
        create_model(name, dim=16, no_such=1)


@pytest.mark.parametrize(("stem", "grid"), [("conv7x7", 8), ("conv3x3", 32), ("patch", 8)])
def test_resnet_stems(stem: str, grid: int) -> None:
    model = resnet(8, stem=stem)
    x = model.maxpool(model.act1(model.bn1(model.conv1(torch.randn(1, 3, 32, 32)))))
    assert x.shape == (1, 8, grid, grid)
    assert model.layer1(x).shape == (1, 8, grid, grid)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixer": "atention"}, "did you mean 'attention'"),
        ({"stem": "conv"}, "unknown stem"),
        ({"norm": "group"}, "unknown norm"),
        ({"residual": "all"}, "unknown residual"),
        ({"mixer": "attention", "heads": 3}, "multiple of heads"),
        ({"img_size": 18}, "multiple of patch_size"),
        ({"stem": "stack", "patch_size": 3, "img_size": 12}, "needs a patch_size of 2, 4"),
        ({"mixer": "pool", "kernel_size": 4}, "odd kernel_size"),
    ],
)
def test_impossible_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Isotropic(**(SIZES | options))
