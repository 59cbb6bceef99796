"""The reference model: parameter counts of the paper, equality with timm, padding, and timm's interface."""

import pytest
import timm
import torch

from convmixer.errors import RequestError
from convmixer.models.convmixer import ConvMixer
from convmixer.models.create import create_model
from convmixer.models.registry import list_models


# arXiv 2201.09792, Tab. 1 and 5; the counts are those of the authors' released weights and of their formula
@pytest.mark.parametrize(
    ("name", "classes", "parameters"),
    [
        ("convmixer_1536_20", 1000, 51_625_960),
        ("convmixer_768_32", 1000, 21_110_248),
        ("convmixer_1024_20", 1000, 24_383_464),
        ("convmixer_256_8_p2_k5", 10, 594_186),
        ("convmixer_256_8_p1_k9", 10, 706_570),
        ("convmixer_128_4_p1_k8", 10, 103_434),
    ],
)
def test_parameter_counts(name: str, classes: int, parameters: int) -> None:
    with torch.device("meta"):
        model = create_model(name, num_classes=classes)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("convmixer_1536_20", "convmixer_1536_20"),
        ("convmixer_768_32", "convmixer_768_32"),
        ("convmixer_1024_20", "convmixer_1024_20_ks9_p14"),
    ],
)
def test_logits_equal_timm(ours: str, theirs: str) -> None:
    torch.manual_seed(0)
    reference = timm.create_model(theirs).eval()
    model = create_model(ours).eval()
    model.load_state_dict(reference.state_dict())
    x = torch.randn(2, 3, 70, 84)
    with torch.no_grad():
        torch.testing.assert_close(model(x), reference(x), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")  # torch warns that it copies
@pytest.mark.parametrize("kernel_size", [1, 2, 3, 8, 9])
def test_padding_equals_torch_same(kernel_size: int) -> None:
    torch.manual_seed(0)
    model = ConvMixer(8, 1, kernel_size, 2, num_classes=3)
    conv = model.blocks[0][0].fn[0]
    same = torch.nn.Conv2d(8, 8, kernel_size, groups=8, padding="same")
    same.load_state_dict(conv.state_dict())
    x = torch.randn(2, 8, 5, 6)
    torch.testing.assert_close(conv(x), same(x))


def test_every_variant_has_a_gradient_for_every_parameter() -> None:
    for name in ("convmixer_128_4_p2_k8", "convmixer_128_4_p4_k3"):
        model = create_model(name)
        out = model(torch.randn(2, 3, 16, 16))
        assert out.shape == (2, 10)
        out.sum().backward()
        assert all(p.grad is not None for p in model.parameters())


def test_eval_output_does_not_depend_on_the_batch() -> None:
    torch.manual_seed(0)
    model = ConvMixer(16, 2, 3, 2, num_classes=4).eval()
    x = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(model(x)[:1], model(x[:1]))


def test_timm_interface() -> None:
    torch.manual_seed(0)
    model = ConvMixer(16, 4, 3, 2, num_classes=4).eval()
    x = torch.randn(2, 3, 8, 8)
    final, features = model.forward_intermediates(x, indices=[0, -1])
    assert [f.shape for f in features] == [(2, 16, 4, 4)] * 2
    torch.testing.assert_close(features[-1], final)
    early = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
    assert len(early) == 1
    torch.testing.assert_close(model.forward_head(model.forward_features(x)), model(x))
    assert model.forward_head(final, pre_logits=True).shape == (2, 16)
    assert model.get_classifier() is model.head
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    model.reset_classifier(0)
    assert model(x).shape == (2, 16)


def test_grad_checkpointing_gives_the_same_gradients() -> None:
    torch.manual_seed(0)
    model = ConvMixer(8, 2, 3, 2, num_classes=3)
    x = torch.randn(4, 3, 8, 8)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).sum().backward()
        gradients.append(model.blocks[0][1].weight.grad.clone())
    torch.testing.assert_close(*gradients)


def test_names() -> None:
    assert "convmixer_1536_20" in list_models("convmixer_1536*")
    assert create_model("convmixer_64_2_p4_k3").depth == 2
    assert any("vit_tiny" in name for name in list_models("vit_tiny*"))
    with pytest.raises(RequestError, match="did you mean 'convmixer_768_32'"):
        create_model("convmixer_768_23")
    with pytest.raises(RequestError, match="unknown model"):
        create_model("no_such_model")


def test_any_other_name_goes_to_timm() -> None:
    model = create_model("vit_tiny_patch16_224", num_classes=5, img_size=32, patch_size=4)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 5)
