"""Attacks through the defences of the diffusion model: their gradient against one without checkpointing and
against differences, its memory, and attacks that share the UNet with them.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import CLASS_NAMES, network

from diff_latent_attack import DiffAttack
from diffattack.attacks.pixel import PixelAttack, Surrogates
from diffattack.classifiers import defences
from diffattack.classifiers.defences import Defended, defend, make_defence
from diffattack.diffusion.inversion import LatentDiffusion
from diffattack.options import AttackOptions, Options

THROUGH = ("denoise", "diffpure:110")
KINDS = {
    "epsilon": dict(prediction_type="epsilon"),
    "velocity": dict(prediction_type="v_prediction", linear_projection=True),
}


@pytest.fixture(params=KINDS)
def diffusion(checkpoint, request) -> LatentDiffusion:
    return LatentDiffusion(checkpoint(**KINDS[request.param]), CLASS_NAMES)


@pytest.fixture
def pipeline(checkpoint):
    return checkpoint(**KINDS["epsilon"])


def random(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gradient_through(defence, images: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    x = images.clone().requires_grad_()
    return torch.autograd.grad((defence(x, random()) * weights).sum(), x)[0]


def kept(defence, image: torch.Tensor) -> int:
    """Bytes that are kept for the backward pass, what is computed anew left out."""
    sizes = []
    pack = lambda tensor: sizes.append(tensor.nbytes) or tensor  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        defence(image.clone().requires_grad_(), random())
    return sum(sizes)


def without_checkpoints(monkeypatch) -> None:
    monkeypatch.setattr(LatentDiffusion, "anew", lambda self, function, *arguments: function(*arguments))


@pytest.mark.parametrize("text", THROUGH)
def test_the_gradient_is_that_of_the_whole_graph_and_of_differences(diffusion, images, text, monkeypatch):
    defence, image = make_defence(text, diffusion), images[:1]
    weights = torch.randn(image.shape, generator=random(4), dtype=torch.float64)
    found = gradient_through(defence, image, weights)
    for net in (diffusion.unet, diffusion.vae):
        assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())
    along = torch.randn(image.shape, generator=random(5), dtype=torch.float64)
    ends = [(defence(image + step * along, random()) * weights).sum() for step in (1e-6, -1e-6)]
    assert (found * along).sum() == pytest.approx((ends[0] - ends[1]).item() / 2e-6, rel=1e-5)
    without_checkpoints(monkeypatch)
    expected = gradient_through(defence, image, weights)
    assert (found - expected).norm() <= 1e-6 * expected.norm()


def test_memory_grows_with_the_steps_by_their_latents_alone(pipeline, images, monkeypatch):
    diffusion = LatentDiffusion(pipeline, CLASS_NAMES)
    # of six steps and of one
    six, one = (make_defence(f"diffpure:{timestep}", diffusion) for timestep in (299, 49))
    inputs = diffusion.encode(images[:1]).nbytes + diffusion.embed([""])[0].nbytes  # of a step
    each = (kept(six, images[:1]) - kept(one, images[:1])) / 5
    assert each == inputs and kept(one, images[:1]) < 4 * images[:1].nbytes
    without_checkpoints(monkeypatch)
    assert (kept(six, images[:1]) - kept(one, images[:1])) / 5 > 100 * each


def test_a_purification_is_the_same_whatever_the_attack_s_steps(pipeline, images):
    """And what it draws is the same for every image of a batch."""
    few, many = (
        make_defence("diffpure:110", LatentDiffusion(pipeline, CLASS_NAMES, diffusion_steps=steps))
        for steps in (20, 50)
    )
    expected = few(images, random())
    assert torch.equal(many(images, random()), expected)
    assert torch.allclose(few(images[1:2], random()), expected[1:2], atol=1e-12)
    assert not torch.allclose(few(images, random(4)), expected, atol=1e-3)


def test_an_attack_draws_purifications_as_it_would_without_computing_anew(pipeline, classifier, images):
    diffusion = LatentDiffusion(pipeline, CLASS_NAMES)
    defended = defend(classifier, ["resize:0.8", "diffpure:40"], diffusion, attack_draws=2)
    x = images.clone().requires_grad_()
    logits = defences.under_attack(defended, x, 3)
    (found,) = torch.autograd.grad(logits[:, 1].sum(), x)
    for k in range(len(images)):
        own = images[k : k + 1].clone().requires_grad_()
        seeds = [defences.ATTACK_SEED + 2 * 3 + j for j in range(2)]
        shares = torch.stack([classifier(defended.changed(own, seed)).softmax(-1) for seed in seeds])
        expected = shares.mean(0).log()
        assert torch.allclose(logits[k], expected[0], atol=1e-9)
        (gradient,) = torch.autograd.grad(expected[0, 1], own)
        assert torch.allclose(found[k : k + 1], gradient, rtol=1e-6, atol=1e-9 * gradient.abs().max())


@pytest.mark.parametrize("guidance, checkpointing, draws", [(1.0, False, 1), (2.5, True, 2)])
def test_the_attacks_own_unet_may_purify(
    pipeline, classifier, images, labels, guidance, checkpointing, draws
):
    """The same as through another one like it, which no controller has touched: nothing of a purification
    gets into the attention maps, nor the other way round.
    """
    parts = {name: copy.deepcopy(getattr(pipeline, name)) for name in ("unet", "vae", "text_encoder")}
    apart = SimpleNamespace(**parts, tokenizer=pipeline.tokenizer, scheduler=pipeline.scheduler)
    options = dict(iterations=2, start_step=18, guidance=guidance, draws=draws, contrast_limit=0)
    others = LatentDiffusion(apart, CLASS_NAMES)
    behind = Defended(classifier, [make_defence("diffpure:60", others)], attack_draws=draws)
    options |= dict(checkpointing=checkpointing)
    expected, found = (
        DiffAttack(pipeline, one, CLASS_NAMES, attack_through=through, **options)(images[:1], labels[:1])
        for one, through in ((behind, ()), (classifier, ("diffpure:60",)))
    )
    for name in ("layer_losses", "attack_loss", "cross_attention_loss", "gradient_norms"):
        ours, theirs = getattr(found.record, name), getattr(expected.record, name)
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-15), name
    assert found.record.layer_losses[-1].abs().max() > 0
    assert torch.allclose(found.adversarial, expected.adversarial, atol=1e-9)


def test_an_attack_on_pixels_through_a_purification(pipeline, classifier, images, labels):
    """It raises the loss behind the defence further than one that does not know of it."""
    diffusion = LatentDiffusion(pipeline, CLASS_NAMES)
    behind = defend(classifier, ["diffpure:110"], diffusion)
    plain, image, losses = copy.deepcopy(classifier).float(), images[:1].float(), []
    for through in ((), ("diffpure:110",)):
        options = dict(attack_through=through, draws=1, diffusion=diffusion)
        attack = PixelAttack("torchattack:PGD(steps=4, eps=8/255)", plain, CLASS_NAMES, **options)
        found = attack(image, labels[:1]).adversarial.double()
        losses.append(-behind(found).log_softmax(-1)[0, labels[0]].item())
    assert losses[1] > losses[0]


# ---------------------------------------------------------------- which draws


def test_attacks_end_and_look_by_other_draws_than_those_that_judge():
    images, seen = torch.rand(2, 3, 32, 32, generator=random(0)), []
    defended = defend(network(5), ["smoothing:0.5"])
    defended.changed = lambda images, seed: seen.append(seed) or images
    defended(images)
    defences.at_a_stop(defended, images)
    judging, ending = defences.SEED, defences.STOP_SEED
    assert seen == [*range(judging, judging + 100), *range(ending, ending + 100)]
    seen.clear()
    looks = Surrogates([defended], torch.tensor([[1]]), 1.0)
    looks(images), looks(images.clone().requires_grad_())  # an attack may look without a gradient, too
    assert seen == [defences.ATTACK_SEED, defences.ATTACK_SEED + 1]
    plain = network(5)
    assert torch.equal(defences.at_a_stop(plain, images), plain(images))


def test_draws_of_an_attack_by_default():
    assert AttackOptions().draws == 8
    assert AttackOptions(attack_through=("resize:0.9", "diffpure:100")).draws == 4
    assert AttackOptions(attack_through=("diffpure:100",), draws=5).draws == 5
    assert Options(model_name=("efficientnet_lite0@diffpure:100",)).draws == 4
    assert Options(model_name=("efficientnet_lite0@jpeg:75",)).draws == 8
