"""The attack against the slow reference in reference.py, and what must hold between its modes."""

import contextlib
import copy

import numpy as np
import pytest
import reference
import stored
import torch
from conftest import CLASS_NAMES, ROOT
from diffusers import PNDMScheduler
from natsort import natsorted

import diff_latent_attack
from diff_latent_attack import DiffAttack
from diffattack.classifiers.heads import SOFTMAX
from diffattack.classifiers.registry import load_classifier
from diffattack.common.device import bytes_saved
from diffattack.common.errors import NonFiniteLossError
from diffattack.common.frozen import frozen
from diffattack.data.classes import IMAGENET_CLASSES
from diffattack.data.images import read_image, to_pixels, to_tensor
from diffattack.diffusion import attention
from diffattack.diffusion.attention import reference_run
from diffattack.diffusion.composition import attention_mask
from diffattack.diffusion.pipeline import load_pipeline
from diffattack.evaluation.metrics import psnr
from diffattack.losses import measured_iterations, timestep_gradient_norms
from diffattack.options import ATTACK_PRESETS
from timestep_weights import SCHEDULES

V = dict(prediction_type="v_prediction", heads=(1, 2, 4, 4), linear_projection=True)
KINDS = {
    "sd1": dict(),
    "sd2": dict(heads=(1, 2, 4, 4), linear_projection=True, scheduler=PNDMScheduler),
    "sd2-v": V,
    "other": dict(latent_channels=6, vae_levels=4, scaling_factor=0.18215, steps_offset=0),
}
# what the reference does
ORIGINAL = ATTACK_PRESETS["diffattack"] | {"inversion": "exact"}


def build(pipeline, classifier, **options) -> DiffAttack:
    return DiffAttack(pipeline, classifier, CLASS_NAMES, **{**ORIGINAL, **options})


def batch_after(attack, inversion, steps=0):
    """The images of an attack after so many steps, to look at the next."""
    batch, _ = attack.begin(inversion)
    for step in range(steps):
        passed = attack.forward(batch, step)
        losses = attack.losses(passed, batch, step + 1)
        attack.descend(losses, passed, batch, torch.zeros(len(inversion.images)).bool())
    return batch


def losses_at(attack, batch, latents):
    """At other start latents; their gradient is of `latents` themselves."""
    batch.optimizer.latents = latents
    return attack.losses(attack.forward(batch, 1), batch, 2)


def compare(attack: DiffAttack, classifier, image, label, caption, weights, iterations, **options):
    """The attack's picture and losses beside the reference's, and that the losses are the same."""
    result = attack(image, torch.tensor([label]))
    given = (attack.pipeline, attack.scheduler, classifier, image, label, caption, weights)
    expected, history = stored.result_of(reference.attack, *given, iterations=iterations, **options)
    return result.adversarial, expected, losses_of(result.record), history


def losses_of(record) -> np.ndarray:
    """Of an image, as the reference's history has them: `(iterations, 4 + N)`."""
    names = ("attack_loss", "self_attention_loss", "cross_attention_loss", "total_loss")
    ours = torch.stack([getattr(record, name) for name in names], dim=1)[..., 0]
    return torch.cat([ours, record.timestep_losses[..., 0]], dim=1).numpy()


@pytest.mark.reference
@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, mode", [("sd1", "uniform"), ("sd2", "fixed"), ("sd2-v", "uniform"), ("other", "fixed")]
)
def test_all_losses_and_the_image_agree_with_the_reference_in_float64(
    checkpoint, classifier, images, kind, mode
):
    attack = build(checkpoint(**KINDS[kind]), classifier, weight_mode=mode, iterations=5)
    weights = reference.weights_of(reference.BASE["learned"], 5) if mode == "fixed" else None
    adversarial, expected, losses, history = compare(
        attack, classifier, images[:1], 1, "polar bear", weights, 5
    )
    np.testing.assert_allclose(losses, history, rtol=1e-6, atol=1e-18)
    assert (adversarial - expected).abs().max() <= 1 / 255
    assert (adversarial - images[:1]).abs().max() > 0.05  # something happened


@pytest.mark.reference
@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, mode, schedule, batch, checkpointing, keep_maps",
    [
        ("sd2", "uniform", None, 1, True, True),
        ("sd2-v", "fixed", "learned", 3, False, True),
        ("sd2", "learnable_detached", "increasing", 3, True, False),
    ],
)
def test_batches_and_savings_of_memory_agree_with_the_reference(
    checkpoint, classifier, images, labels, monkeypatch, kind, mode, schedule, batch, checkpointing, keep_maps
):
    """(1, False, True) is the test above; without kept maps they are computed anew at each timestep."""
    monkeypatch.setattr("diffattack.diffusion.attention.REFERENCE_SHARE", 1.0 if keep_maps else 0.0)
    options = dict(weight_mode=mode, iterations=2, checkpointing=checkpointing)
    attack = build(checkpoint(**KINDS[kind]), classifier, **options)
    result = attack(images[:batch], labels[:batch])
    weights = schedule and reference.weights_of(reference.BASE[schedule], 5)
    for k in range(batch):
        given = (images[k : k + 1], labels[k].item(), CLASS_NAMES[labels[k]], weights)
        slow, history = stored.result_of(
            reference.attack, attack.pipeline, attack.scheduler, classifier, *given, iterations=2
        )
        np.testing.assert_allclose(losses_of(result.record.of_image(k)), history, rtol=1e-6, atol=1e-18)
        assert (result.adversarial[k] - slow[0]).abs().max() <= 1 / 255


@pytest.mark.reference
@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, checkpointing, given, rate", [("sd2", False, 0.05, 0.05), ("sd2-v", True, None, 1e-4 * 30 / 4)]
)
def test_learnable_weights_agree_with_the_reference(
    checkpoint, classifier, images, kind, checkpointing, given, rate
):
    options = dict(weight_mode="learnable", weight_lr=given, iterations=4, checkpointing=checkpointing)
    attack = build(checkpoint(**KINDS[kind]), classifier, **options)
    network = copy.deepcopy(attack.controller.network)
    learning = torch.optim.Adam(network.parameters(), lr=rate)
    _, _, losses, history = compare(
        attack, classifier, images[:1], 1, "polar bear", network, 4, learning=learning
    )
    np.testing.assert_allclose(losses, history, rtol=1e-6, atol=1e-18)
    assert torch.allclose(attack.controller.weights(), network().detach(), rtol=1e-6)
    assert not torch.allclose(network(), network.start.exp(), atol=0.2 * rate)


@pytest.mark.reference
@pytest.mark.slow
@pytest.mark.parametrize(
    "mode, adaptive, share",
    [
        ("minimax", reference.Minimax, None),
        ("minimax", reference.Minimax, 0.5),
        ("uncertainty", reference.Uncertainty, 0.5),
    ],
)
def test_weights_that_each_image_learns_agree_with_the_reference(
    checkpoint, classifier, images, mode, adaptive, share
):
    options = dict(weight_mode=mode, iterations=5, structure_share=share)
    attack = build(checkpoint(**KINDS["sd2"]), classifier, **options)
    given = (images[:1], 1, "polar bear", [0.2] * 5, 5)
    _, _, losses, history = compare(attack, classifier, *given, adaptive=adaptive(5), share=share)
    np.testing.assert_allclose(losses, history, rtol=1e-6, atol=1e-18)


@pytest.mark.slow
def test_balanced_weights_follow_the_gradient_of_each_timestep(checkpoint, classifier, images, labels):
    """Which is compared with a difference of losses along it."""
    result, attack = run(checkpoint, classifier, images[:2], labels[:2], weight_mode="balanced", iterations=4)
    weights = result.record.weights
    assert weights.shape == (4, 5, 2)
    assert (weights[:2] == 0.2).all()
    assert torch.equal(weights[2], weights[3]) and not torch.allclose(weights[2], weights[1], atol=1e-3)

    one_step = build(checkpoint(), classifier, iterations=1, guidance=1.0)
    inversion = INVERSIONS[tuple(labels[:2].tolist())]
    with frozen(attack.unet, attack.vae, classifier), one_step.controller.attached(attack.unet, 1):
        batch = batch_after(one_step, inversion, steps=1)
        latents = batch.optimizer.latents.detach().requires_grad_()

        def timestep_losses(x):
            return losses_at(one_step, batch, x).timestep_losses

        losses = losses_at(one_step, batch, latents)
        norms = timestep_gradient_norms(losses, latents)
        # the longest derivative is along the gradient, and as long as it
        (gradient,) = torch.autograd.grad(losses.timestep_losses[3, 0], latents)
        step = 1e-5 * gradient / gradient.norm()
        with torch.no_grad():
            slope = (timestep_losses(latents + step) - timestep_losses(latents - step))[3, 0] / 2e-5
    assert slope.item() == pytest.approx(norms[3, 0].item(), rel=1e-4)
    products = weights[2] * norms
    assert torch.allclose(products, products[:1].expand_as(products))


@pytest.mark.reference
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd1", "sd2-v"])
def test_the_original_inversion_agrees_with_the_reference(checkpoint, classifier, images, kind):
    attack = build(checkpoint(**KINDS[kind]), classifier, inversion="diffattack", iterations=2)
    given = (images[:1], 1, "polar bear", None, 2)
    adversarial, expected, losses, history = compare(
        attack, classifier, *given, inversion=reference.invert_as_diffattack
    )
    np.testing.assert_allclose(losses, history, rtol=1e-6, atol=1e-18)
    assert (adversarial - expected).abs().max() <= 1 / 255
    exact = build(checkpoint(**KINDS[kind]), classifier).invert(images[:1], torch.tensor([1]))
    assert not torch.allclose(attack.invert(images[:1], torch.tensor([1])).latents, exact.latents)


def test_gradients_are_measured_early_and_at_the_end_and_a_share_as_it_grows():
    assert measured_iterations(30, None) == [2, 30] and measured_iterations(30, None, True) == [2, 10, 30]
    assert measured_iterations(30, 0.1) == [2, 3, 5, 8, 13, 21, 30]
    for share in (None, 0.1):
        assert measured_iterations(1, share) == [1] and measured_iterations(2, share) == [2]
    assert measured_iterations(100, 0.1)[-3:] == [55, 89, 100]


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.03, 2.0])
def test_the_structure_term_gets_its_share_of_the_gradient(checkpoint, classifier, images, labels, share):
    options = dict(weight_mode="fixed", structure_share=share, iterations=5)
    record = run(checkpoint, classifier, images[:2], labels[:2], **options)[0].record
    assert record.gradient_iterations == [2, 3, 5]
    norms, factors = record.gradient_norms, record.self_attention_factor
    assert torch.allclose(norms[:, 1], share * norms[:, 0])
    assert (factors[0] == 0).all() and torch.equal(factors[2], factors[3])  # kept until it is renewed
    assert len(set(factors[1].tolist())) == (2 if share else 1)  # each image has its own
    total = (
        -10 * record.attack_loss + factors * record.self_attention_loss + 1e4 * record.cross_attention_loss
    )
    assert torch.allclose(total, record.total_loss)


@pytest.mark.slow
def test_one_weight_network_serves_all_images_and_goes_on_from_its_state(
    checkpoint, classifier, images, labels
):
    options = dict(weight_mode="learnable", weight_lr=0.05)
    _, whole = run(checkpoint, classifier, images[:1], labels[:1], **options)
    fresh = build(checkpoint(), classifier, iterations=4, guidance=1.0, **options)
    fresh.controller.load_state(whole.controller.state())
    end = whole.controller.weights()
    going_on, anew = (attack(images[1:2], labels[1:2]).record.weights for attack in (whole, fresh))
    assert torch.equal(going_on, anew) and torch.equal(anew[0], end) and not torch.equal(anew[-1], end)


def test_checkpointing_starts_by_itself_where_memory_is_short(
    checkpoint, classifier, images, labels, monkeypatch
):
    calls, real = [], diff_latent_attack.recompute
    counting = lambda *arguments: calls.append(1) or real(*arguments)  # noqa: E731
    monkeypatch.setattr(diff_latent_attack, "recompute", counting)
    attack = build(checkpoint(), classifier, iterations=1)
    inversion = attack.invert(images[:1], labels[:1])
    with frozen(attack.unet), attack.controller.attached(attack.unet, attack.branches):
        needed = 5 * reference_run(attack, attack.controller.collecting, inversion).graph_bytes
    for share, expected in ((1.1, 0), (0.9, 6)):  # each timestep, and the decoder
        free = share * needed / attention.GRAPH_SHARE
        monkeypatch.setattr(attention, "free_memory", lambda device, free=free: free)
        calls.clear()
        attack.attack(inversion)
        assert len(calls) == expected


@pytest.mark.parametrize("checkpointing", [False, True])
def test_graphs_are_as_large_as_estimated(checkpoint, classifier, images, labels, checkpointing):
    """What autograd really keeps for one iteration, counted from outside."""
    attack = build(checkpoint(), classifier, iterations=1, checkpointing=checkpointing)
    inversion = attack.invert(images[:1], labels[:1])
    networks = attack.unet, attack.vae, classifier
    with frozen(*networks), attack.controller.attached(attack.unet, attack.branches):
        batch = batch_after(attack, inversion)
        unperturbed, latents = batch.reference, batch.optimizer.latents
        with bytes_saved(attack.unet) as saved:
            attack.losses(attack.forward(batch, 1), batch, 2)
        with bytes_saved(attack.vae) as decoder:
            classifier(attack.decode(latents))
    kept, estimated = sum(saved) - sum(decoder), 5 * unperturbed.graph_bytes
    assert kept < 0.02 * estimated if checkpointing else kept == pytest.approx(estimated, rel=0.2)


@pytest.mark.reference
@pytest.mark.slow
@pytest.mark.parametrize("steps, start, guidance", [(20, 17, 0.0), (10, 3, 7.5)])
def test_other_settings_agree_with_the_reference(checkpoint, classifier, images, steps, start, guidance):
    options = dict(weight_mode="fixed", weight_schedule="increasing", diffusion_steps=steps, start_step=start)
    options |= dict(attack_loss_weight=3.0, cross_attn_loss_weight=500.0, self_attn_loss_weight=70.0)
    attack = build(checkpoint(), classifier, guidance=guidance, iterations=3, **options)
    given = (images[1:2], 0, "cat", reference.weights_of(reference.BASE["increasing"], steps - start), 3)
    factors = dict(attack_weight=3.0, cross_weight=500.0, self_weight=70.0)
    _, _, losses, history = compare(
        attack, classifier, *given, start_step=start, guidance=guidance, **factors
    )
    np.testing.assert_allclose(losses, history, rtol=1e-6, atol=1e-18)


def test_inversion_and_null_text_agree_with_the_reference(checkpoint, classifier, images, labels):
    attack = build(checkpoint(), classifier)
    inversion, pipeline = attack.invert(images[:1], labels[:1]), attack.pipeline
    null, text = reference.embed(pipeline, ""), reference.embed(pipeline, "polar bear")
    encoded = reference.encode(pipeline, images[:1])
    trajectory = reference.invert(pipeline, attack.scheduler, encoded, null)
    assert len(trajectory) == 21  # it goes on to where the attack never looks
    assert torch.allclose(inversion.latents, trajectory[5], rtol=0, atol=1e-12)
    given = (trajectory, attack.timesteps.tolist(), text, null, 2.5)
    expected = reference.null_text(pipeline, attack.scheduler, *given)
    for embedding, slow in zip(inversion.null_embeddings, expected, strict=True):
        assert torch.allclose(embedding, slow, rtol=0, atol=1e-8)


@pytest.fixture(scope="module")
def demo():
    """The demo model in float32, the default surrogate, and one demo photograph with its label, at 128
    pixels, where the reference takes a third of the time.
    """
    path = natsorted((ROOT / "demo/images").iterdir(), key=lambda path: path.name)[0]
    label = int((ROOT / "demo/labels.txt").read_text().split()[0]) - 1
    return (
        load_pipeline(str(ROOT / "demo/tiny_diffusion"), torch.device("cpu")),
        load_classifier("efficientnet_lite0"),
        read_image(path, 128),
        label,
    )


@pytest.mark.reference
def test_float32_on_the_demo_model_agrees_with_the_reference(demo):
    """Losses at the latents of the reference's first three iterations, and the final images of two
    independent runs.

    Two runs drift apart from the first step on, because AdamW's first steps are signs of the gradient, and
    where it is next to zero rounding decides the sign.
    """
    pipeline, classifier, picture, label = demo
    image, caption, visited = to_tensor(picture), IMAGENET_CLASSES[label], []
    attack = DiffAttack(pipeline, classifier, **ORIGINAL | {"iterations": 3})
    given = (pipeline, attack.scheduler, classifier, image, label, caption)
    expected, history = stored.result_of(reference.attack, *given, visited=visited, iterations=3)
    inversion = attack.invert(image, torch.tensor([label]))
    result = attack.attack(inversion)
    assert psnr(to_pixels(result.adversarial[0]), to_pixels(expected[0])) >= 40
    np.testing.assert_allclose(result.record.total_loss[0], history[0, 3], rtol=1e-4)

    inversion.null_embeddings = visited[0]
    with frozen(pipeline.unet, pipeline.vae), attack.controller.attached(pipeline.unet):
        batch = batch_after(attack, inversion)
        for latents, slow in zip(visited[1:4], history):
            losses = losses_at(attack, batch, latents)
            np.testing.assert_allclose(losses.terms[:, 0].detach(), slow[:3], rtol=1e-4, atol=1e-9)


# ---------------------------------------------------------------- between modes

# of the images that the tests below share, by their labels: an inversion does not depend on what is attacked
# afterwards
INVERSIONS = {}


def run(checkpoint, classifier, images, labels, **options):
    """Without guidance, which needs a third of the time; with it is compared with the reference above."""
    attack = build(checkpoint(), classifier, **{"iterations": 4, "guidance": 1.0, **options})
    key = tuple(labels.tolist())
    if key not in INVERSIONS:
        INVERSIONS[key] = attack.invert(images, labels)
    return attack.attack(INVERSIONS[key]), attack


def test_modes_that_are_the_same_loss(checkpoint, classifier, images, labels):
    """Fixed uniform weights and none; detached weights, which never move, and those that they start at."""

    def attacked(mode, schedule="learned", **options):
        options |= dict(weight_mode=mode, weight_schedule=schedule)
        return run(checkpoint, classifier, images[:1], labels[:1], **options)[0]

    detached = attacked("learnable_detached", weight_lr=1.0)
    pairs = (attacked("fixed", "uniform"), attacked("uniform")), (attacked("fixed", "increasing"), detached)
    for one, other in pairs:
        assert torch.allclose(one.adversarial, other.adversarial, rtol=0, atol=1e-9)
    assert not torch.allclose(pairs[0][0].adversarial, detached.adversarial, rtol=0, atol=1e-6)
    assert torch.equal(detached.record.weights, detached.record.weights[:1].expand(4, -1))
    assert detached.record.weights[0].tolist() == pytest.approx(SCHEDULES["increasing"])


@pytest.mark.slow
def test_learned_weights_collapse_onto_the_smallest_loss(checkpoint, classifier, images, labels):
    options = dict(weight_mode="learnable", weight_lr=0.05, iterations=30)
    result, _ = run(checkpoint, classifier, images[:1], labels[:1], **options)
    weights, losses = result.record.weights, result.record.timestep_losses[1:, :, 0]
    smallest = losses.mean(0).argmin()
    assert weights[0].tolist() == pytest.approx(SCHEDULES["increasing"])
    assert weights[-1].argmax() == smallest and weights[-1, smallest] > 0.9


@pytest.mark.slow
def test_the_record_adds_up_to_what_was_minimised(checkpoint, classifier, images, labels):
    result, _ = run(checkpoint, classifier, images[:2], labels[:2], weight_mode="fixed")
    record = result.record
    by_timestep = record.layer_losses.sum(2)  # (iterations, N, B)
    structure = (5 * record.weights[..., None] * by_timestep).sum(1)
    assert record.layer_losses.shape == (4, 5, len(record.layers), 2) and len(record.layers) == 10
    assert torch.allclose(structure, record.self_attention_loss)
    assert torch.allclose(
        -10 * record.attack_loss + 100 * structure + 10000 * record.cross_attention_loss, record.total_loss
    )
    assert (record.timestep_losses[0] == 0).all() and (record.timestep_losses[1:] > 0).all()
    assert record.timesteps.tolist() == [201, 151, 101, 51, 1]


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_norms_are_those_of_each_term_by_itself(
    checkpoint, classifier, images, labels, checkpointing
):
    options = dict(weight_mode="fixed", checkpointing=checkpointing)
    result, attack = run(checkpoint, classifier, images[:2], labels[:2], iterations=2, **options)
    assert result.record.gradient_iterations == [2] and result.record.gradient_norms.shape == (1, 3, 2)
    one_step = build(checkpoint(), classifier, iterations=1, guidance=1.0, **options)
    inversion = INVERSIONS[tuple(labels[:2].tolist())]
    with frozen(attack.unet, attack.vae, classifier), one_step.controller.attached(attack.unet, 1):
        batch = batch_after(one_step, inversion, steps=1)
        latents = batch.optimizer.latents.detach().requires_grad_()
        for k, factor in enumerate((10, 100, 10000)):
            term = losses_at(one_step, batch, latents).terms[k]
            (gradient,) = torch.autograd.grad(factor * term.sum(), latents)
            expected = gradient.flatten(1).norm(dim=1)
            assert torch.allclose(result.record.gradient_norms[0, k], expected, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("mode, share", [("uniform", None), ("fixed", None), ("minimax", 0.3)])
def test_images_of_a_batch_do_not_influence_each_other(checkpoint, classifier, images, labels, mode, share):
    options = dict(weight_mode=mode, structure_share=share)
    together, _ = run(checkpoint, classifier, images, labels, **options)
    for k in range(3):
        alone, _ = run(checkpoint, classifier, images[k : k + 1], labels[k : k + 1], **options)
        assert torch.allclose(together.record.of_image(k).weights, alone.record.of_image(0).weights)
        assert torch.allclose(together.adversarial[k], alone.adversarial[0], rtol=0, atol=1e-9)
        assert torch.allclose(
            together.record.layer_losses[..., k], alone.record.layer_losses[..., 0], rtol=1e-6, atol=1e-18
        )


@pytest.mark.slow
def test_mask_keeps_the_rest_of_the_image(checkpoint, classifier, images, labels):
    soft, attack = run(checkpoint, classifier, images[:1], labels[:1], is_apply_mask=True)
    hard, _ = run(checkpoint, classifier, images[:1], labels[:1], is_hard_mask=True)
    inversion = attack.invert(images[:1], labels[:1])
    with attack.controller.attached(attack.unet, attack.branches):
        reference = reference_run(attack, attack.controller.collecting, inversion)
    mask = attention_mask(reference.class_attention, inversion.class_tokens, images.shape[-2:])[0, 0]
    cut = (mask > 0.5).double()
    assert mask.max() == pytest.approx(1, abs=0.05)
    outside = cut == 0
    assert torch.equal(hard.adversarial[0][:, outside], images[0][:, outside])
    assert ((soft.adversarial - images[:1]).abs()[0] <= mask + 1e-12).all()


# ---------------------------------------------------------------- what is left behind


class Failing(torch.nn.Module):
    def __init__(self, message=None):
        super().__init__()
        self.message, self.scale = message, torch.nn.Parameter(torch.ones(()))

    def forward(self, x):
        if self.message:
            raise RuntimeError(self.message)
        return x.mean((2, 3)).repeat(1, 2)[:, :5] * self.scale * float("nan")


@pytest.mark.parametrize("fails", [False, True])
def test_everything_set_on_the_models_is_put_back(checkpoint, classifier, images, labels, fails):
    pipeline = checkpoint()
    victim = Failing("planned") if fails else classifier
    modules = (pipeline.unet, pipeline.vae, pipeline.text_encoder, victim)
    pipeline.unet.train()
    next(pipeline.vae.parameters()).requires_grad_(False)

    def state():
        parameters = [p for module in modules for p in module.parameters()]
        set_on = [m.training for m in modules], [(p.requires_grad, p.grad) for p in parameters]
        scheduler = copy.deepcopy(dict(pipeline.scheduler.config)), type(pipeline.scheduler)
        return set_on, pipeline.unet.attn_processors, scheduler

    before = state()
    attack = build(pipeline, victim, iterations=2)
    with pytest.raises(RuntimeError, match="planned") if fails else contextlib.nullcontext():
        attack(images[:1], labels[:1])
    try:
        assert state() == before
    finally:
        pipeline.unet.eval()
        next(pipeline.vae.parameters()).requires_grad_(True)


def test_a_loss_that_is_not_finite_says_where(checkpoint, images, labels):
    with pytest.raises(NonFiniteLossError, match="attack loss is not finite in iteration 1"):
        build(checkpoint(), Failing().double(), iterations=2)(images[:1], labels[:1])


@pytest.mark.parametrize("start", [0, 20])
def test_start_step_out_of_range(checkpoint, classifier, start):
    with pytest.raises(ValueError, match="start_step"):
        build(checkpoint(), classifier, start_step=start)


# ---------------------------------------------------------------- several classifiers, several labels,
# targets, v-prediction


def cross_entropies(classifier, image: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Of every class, for one image: (classes,)."""
    return -(classifier(image)[0] / temperature).log_softmax(-1)


@pytest.fixture(scope="module")
def another():
    torch.manual_seed(5)
    layers = torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, len(CLASS_NAMES))
    return torch.nn.Sequential(*layers).double()


def test_of_several_classifiers_the_mean_of_their_losses_is_attacked(
    checkpoint, classifier, another, images, labels
):
    networks = [classifier, another]
    both, _ = run(checkpoint, networks, images[:1], labels[:1])
    start = both.reconstruction
    expected = sum(cross_entropies(network, start)[labels[0]].item() for network in networks) / 2
    assert both.record.attack_loss[0, 0].item() == pytest.approx(expected, rel=1e-9)
    assert both.record.fooled[0, 0] == all(network(start).argmax() != labels[0] for network in networks)
    alone, _ = run(checkpoint, classifier, images[:1], labels[:1])
    twice, _ = run(checkpoint, [classifier, classifier], images[:1], labels[:1])
    assert torch.allclose(alone.adversarial, twice.adversarial, rtol=0, atol=1e-9)
    assert not torch.allclose(alone.adversarial, both.adversarial, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_of_several_labels_the_mean_of_their_losses_is_attacked(checkpoint, classifier, images):
    labels = torch.tensor([[1, 4], [0, -1]])
    attack = build(checkpoint(), classifier, iterations=2, guidance=1.0)
    result = attack(images[:2], labels)
    start, record = result.reconstruction, result.record
    losses, other = (cross_entropies(classifier, start[k : k + 1]) for k in range(2))
    expected = [losses[[1, 4]].mean().item(), other[0].item()]
    assert record.attack_loss[0].tolist() == pytest.approx(expected, rel=1e-9)
    assert record.confidence[0, 0].item() == pytest.approx((-losses[[1, 4]]).exp().sum().item(), rel=1e-9)
    assert attack.prompts(labels) == [f"{CLASS_NAMES[1]}, {CLASS_NAMES[4]}", CLASS_NAMES[0]]
    single = build(checkpoint(), classifier, iterations=2, guidance=1.0)
    alone = single(images[1:2], labels[1:, :1])
    assert torch.allclose(record.total_loss[:, 1], alone.record.total_loss[:, 0], rtol=1e-6)


@pytest.mark.slow
def test_a_targeted_attack_comes_nearer_to_its_target(checkpoint, classifier, images, labels):
    attack = build(checkpoint(), classifier, iterations=8, guidance=1.0)
    result = attack.attack(attack.invert(images[:1], labels[:1], torch.tensor([4])))
    record = result.record
    assert record.attack_loss[0, 0].item() == pytest.approx(
        cross_entropies(classifier, result.reconstruction)[4].item(), rel=1e-9
    )
    assert cross_entropies(classifier, result.adversarial)[4] < record.attack_loss[0, 0] - 0.01
    assert torch.allclose(
        10 * record.attack_loss + 100 * record.self_attention_loss + 10000 * record.cross_attention_loss,
        record.total_loss,
    )


def test_logit_temperature(checkpoint, classifier, images, labels):
    result, _ = run(checkpoint, classifier, images[:1], labels[:1], iterations=1, logit_temperature=10.0)
    expected = cross_entropies(classifier, result.reconstruction, 10)[labels[0]].item()
    assert result.record.attack_loss[0, 0].item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    "predicted, target, expected",
    [(1, -1, False), (4, -1, False), (2, -1, True), (2, 3, False), (3, 3, True), (1, 3, False)],
)
def test_what_counts_as_fooled(predicted, target, expected):
    logits = torch.nn.functional.one_hot(torch.tensor([[predicted]]), 5).double()  # (classifiers, B, classes)
    assert SOFTMAX.fooled(logits, torch.tensor([[1, 4]]), torch.tensor([target])).tolist() == [[expected]]


@pytest.mark.slow
def test_v_prediction_reconstructs_as_well_as_epsilon_prediction(demo):
    """The demo model, its UNet's answer restated as v = (epsilon - sqrt(1 - abar) x) / sqrt(abar) (Salimans
    and Ho, arXiv 2202.00512).
    """
    pipeline, classifier, picture, label = demo

    class Restated(type(pipeline.unet)):
        def forward(self, sample, timestep, *arguments, **options):
            epsilon = super().forward(sample, timestep, *arguments, **options)
            alpha, sigma = attack.signal_and_noise(int(timestep))
            return type(epsilon)(sample=(epsilon.sample - sigma * sample) / alpha)

    other = copy.copy(pipeline)
    other.unet = copy.deepcopy(pipeline.unet)
    other.unet.__class__ = Restated
    other.scheduler = type(pipeline.scheduler).from_config(
        pipeline.scheduler.config, prediction_type="v_prediction"
    )
    figures = []
    for source in (pipeline, other):
        attack = DiffAttack(source, classifier, **ORIGINAL | {"guidance": 1.0})
        inversion = attack.invert(to_tensor(picture), torch.tensor([label]))
        figures.append(psnr(picture, to_pixels(attack.reconstruct(inversion)[0])))
    assert attack.scheduler.config.prediction_type == "v_prediction" and abs(figures[0] - figures[1]) < 0.5
