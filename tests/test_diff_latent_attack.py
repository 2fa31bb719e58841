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

import diff_latent_attack
from diff_latent_attack import DiffAttack
from diffattack.classifiers.heads import SOFTMAX
from diffattack.classifiers.registry import load_classifier
from diffattack.common.device import bytes_saved
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


@contextlib.contextmanager
def batch_after(attack, inversion, steps=0):
    """The images of an attack after so many steps, while one looks at the next."""
    networks = attack.unet, attack.vae, *attack.classifiers
    with frozen(*networks), attack.controller.attached(attack.unet, attack.branches):
        batch, _ = attack.begin(inversion)
        for step in range(steps):
            passed = attack.forward(batch, step)
            losses = attack.losses(passed, batch, step + 1)
            attack.descend(losses, passed, batch, torch.zeros(len(inversion.images)).bool())
        yield batch


def losses_at(attack, batch, latents):
    """At other start latents; their gradient is of `latents` themselves."""
    batch.optimizer.latents = latents
    return attack.losses(attack.forward(batch, 1), batch, 2)


def losses_of(record) -> np.ndarray:
    """Of an image, as the reference's history has them: `(iterations, 4 + N)`."""
    names = ("attack_loss", "self_attention_loss", "cross_attention_loss", "total_loss")
    ours = torch.stack([getattr(record, name) for name in names], dim=1)[..., 0]
    return torch.cat([ours, record.timestep_losses[..., 0]], dim=1).numpy()


def agree(attack, classifier, images, labels, weights, **options):
    """The losses of all iterations and the pictures are the reference's, image by image."""
    result = attack(images, labels)
    for k, label in enumerate(labels.tolist()):
        given = (classifier, images[k : k + 1], label, CLASS_NAMES[label], weights)
        options = {"iterations": attack.options.iterations, **options}
        expected, history = stored.result_of(
            reference.attack, attack.pipeline, attack.scheduler, *given, **options
        )
        np.testing.assert_allclose(losses_of(result.record.of_image(k)), history, rtol=1e-6, atol=1e-18)
        assert (result.adversarial[k] - expected[0]).abs().max() <= 1e-6
        assert (result.adversarial[k] - images[k]).abs().max() > 0.01  # something happened


def of_text(pipeline, scheduler, latents, null):
    """The reference's inversion, with the prompt."""
    return reference.invert(pipeline, scheduler, latents, reference.embed(pipeline, "polar bear"))


def options_of(start, steps, guidance):
    ours = dict(attack_loss_weight=3.0, cross_attn_loss_weight=500.0, self_attn_loss_weight=70.0)
    ours |= dict(weight_mode="fixed", weight_schedule="increasing", diffusion_steps=steps, iterations=3)
    factors = dict(attack_weight=3.0, cross_weight=500.0, self_weight=70.0)
    both = dict(start_step=start, guidance=guidance)
    weights = reference.weights_of(reference.BASE["increasing"], steps - start)
    return "sd1", slice(1, 2), ours | both, weights, both | factors


FIXED, FIRST, ALL = dict(weight_mode="fixed", iterations=5), slice(1), slice(3)
LEARNED, INCREASING = (reference.weights_of(reference.BASE[name], 5) for name in ("learned", "increasing"))
TWO, ORIGINALS = dict(iterations=2), dict(inversion=reference.invert_as_diffattack)
DETACHED = TWO | dict(weight_mode="learnable_detached", checkpointing=True)
MINIMAX, SHARE = dict(weight_mode="minimax", iterations=5), dict(structure_share=0.5)
EVEN, HALF = [0.2] * 5, dict(share=0.5)
CASES = {  # checkpoint, images, options of the attack, weights and further options of the reference
    "uniform": ("sd1", FIRST, dict(iterations=5), None, {}),
    "fixed": ("sd2", FIRST, FIXED, LEARNED, {}),
    "velocity": ("sd2-v", FIRST, dict(iterations=5), None, {}),
    "other networks": ("other", FIRST, FIXED, LEARNED, {}),
    "checkpointing": ("sd2", FIRST, TWO | dict(checkpointing=True), None, {}),
    "batch": ("sd2-v", ALL, FIXED | TWO | dict(checkpointing=False), LEARNED, {}),
    "maps computed anew": ("sd2", ALL, DETACHED, INCREASING, {}),
    "minimax": ("sd2", FIRST, MINIMAX, EVEN, dict(adaptive=reference.Minimax(5), share=None)),
    "share": ("sd2", FIRST, MINIMAX | SHARE, EVEN, dict(adaptive=reference.Minimax(5), **HALF)),
    "uncertainty": (
        *("sd2", FIRST, MINIMAX | SHARE | dict(weight_mode="uncertainty"), EVEN),
        dict(adaptive=reference.Uncertainty(5), **HALF),
    ),
    "inversion": ("sd1", FIRST, TWO | dict(inversion="diffattack"), None, ORIGINALS),
    "inversion, velocity": ("sd2-v", FIRST, TWO | dict(inversion="diffattack"), None, ORIGINALS),
    # the reference computes both branches, and its null-text optimisation comes to nothing
    "one branch": (
        *("sd1", FIRST, dict(weight_mode="fixed", iterations=4, guidance=1.0, checkpointing=True), LEARNED),
        dict(guidance=1.0, inversion=of_text),
    ),
    "late start": options_of(17, 20, 0.0),
    "few steps": options_of(3, 10, 7.5),
}


@pytest.mark.reference
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_all_losses_and_the_images_agree_with_the_reference_in_float64(
    checkpoint, classifier, images, labels, monkeypatch, case
):
    monkeypatch.setattr(attention, "REFERENCE_SHARE", 0.0 if case == "maps computed anew" else 1.0)
    kind, rows, options, weights, more = CASES[case]
    attack = build(checkpoint(**KINDS[kind]), classifier, **options)
    agree(attack, classifier, images[rows], labels[rows], weights, **more)


@pytest.mark.reference
@pytest.mark.slow
@pytest.mark.parametrize("kind, given, rate", [("sd2", 0.05, 0.05), ("sd2-v", None, 1e-4 * 30 / 4)])
def test_learnable_weights_agree_with_the_reference(
    checkpoint, classifier, images, labels, kind, given, rate
):
    options = dict(weight_mode="learnable", weight_lr=given, iterations=4, checkpointing=kind == "sd2-v")
    attack = build(checkpoint(**KINDS[kind]), classifier, **options)
    network = copy.deepcopy(attack.controller.network)
    learning = torch.optim.Adam(network.parameters(), lr=rate)
    agree(attack, classifier, images[:1], labels[:1], network, learning=learning)
    assert torch.allclose(attack.controller.weights(), network().detach(), rtol=1e-6)
    assert not torch.allclose(network(), network.start.exp(), atol=0.2 * rate)


@pytest.mark.reference
def test_float32_on_the_demo_model_agrees_with_the_reference():
    """Losses at the latents of the reference's first three iterations, and the final images of two
    independent runs, at 128 pixels, where the reference takes a third of the time.

    Two runs drift apart from the first step on, because AdamW's first steps are signs of the gradient, and
    where it is next to zero rounding decides the sign.
    """
    pipeline = load_pipeline(str(ROOT / "demo/tiny_diffusion"), torch.device("cpu"))
    label = int((ROOT / "demo/labels.txt").read_text().split()[0]) - 1
    image = to_tensor(read_image(min((ROOT / "demo/images").iterdir()), 128))
    classifier, caption, visited = load_classifier("efficientnet_lite0"), IMAGENET_CLASSES[label], []
    attack = DiffAttack(pipeline, classifier, **ORIGINAL | {"iterations": 3})
    given = (pipeline, attack.scheduler, classifier, image, label, caption)
    expected, history = stored.result_of(reference.attack, *given, visited=visited, iterations=3)
    inversion = attack.invert(image, torch.tensor([label]))
    result = attack.attack(inversion)
    assert psnr(to_pixels(result.adversarial[0]), to_pixels(expected[0])) >= 40
    np.testing.assert_allclose(result.record.total_loss[0], history[0, 3], rtol=1e-4)
    inversion.null_embeddings = visited[0]
    with batch_after(attack, inversion) as batch:
        for latents, slow in zip(visited[1:4], history):
            losses = losses_at(attack, batch, latents)
            np.testing.assert_allclose(losses.terms[:, 0].detach(), slow[:3], rtol=1e-4, atol=1e-9)


# ---------------------------------------------------------------- between modes


@pytest.fixture(scope="module")
def run(checkpoint, classifier, images, labels):
    """From rows of the images, and options, to the result and the attack. Without guidance, which needs a
    third of the time; an inversion does not depend on what is attacked afterwards.
    """
    inversions = {}

    def run(rows=slice(1), networks=classifier, **options):
        attack = build(checkpoint(), networks, **{"iterations": 4, "guidance": 1.0, **options})
        key = str(rows)
        inversions[key] = inversions.get(key) or attack.invert(images[rows], labels[rows])
        return attack.attack(inversions[key]), attack, inversions[key]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_each_term_and_of_each_timestep_by_itself(run, checkpointing):
    """Those of timesteps against a difference of losses along them; with balanced weights."""
    options = dict(weight_mode="balanced", checkpointing=checkpointing)
    result, _, _ = run(slice(2), **options)
    weights = result.record.weights
    assert weights.shape == (4, 5, 2) and (weights[:2] == 0.2).all()
    assert torch.equal(weights[2], weights[3]) and not torch.allclose(weights[2], weights[1], atol=1e-3)
    assert result.record.gradient_iterations[0] == 2
    _, attack, inversion = run(slice(2), **options | {"iterations": 1})
    with batch_after(attack, inversion, steps=1) as batch:
        latents = batch.optimizer.latents.detach().requires_grad_()
        for k, factor in enumerate((10, 100, 10000)):
            term = losses_at(attack, batch, latents).terms[k]
            (gradient,) = torch.autograd.grad(factor * term.sum(), latents)
            expected = gradient.flatten(1).norm(dim=1)
            assert torch.allclose(result.record.gradient_norms[0, k], expected, rtol=1e-6)
        losses = losses_at(attack, batch, latents)
        norms = timestep_gradient_norms(losses, latents)
        # the longest derivative is along the gradient, and as long as it
        (gradient,) = torch.autograd.grad(losses.timestep_losses[3, 0], latents)
        step = 1e-5 * gradient / gradient.norm()
        with torch.no_grad():
            ends = [losses_at(attack, batch, latents + s).timestep_losses[3, 0] for s in (step, -step)]
    assert (ends[0] - ends[1]).item() / 2e-5 == pytest.approx(norms[3, 0].item(), rel=1e-4)
    products = weights[2] * norms
    assert torch.allclose(products, products[:1].expand_as(products))


def test_gradients_are_measured_early_and_at_the_end_and_a_share_as_it_grows():
    assert measured_iterations(30, None) == [2, 30] and measured_iterations(30, None, True) == [2, 10, 30]
    assert measured_iterations(30, 0.1) == [2, 3, 5, 8, 13, 21, 30]
    assert measured_iterations(1, None) == measured_iterations(1, 0.1) == [1]


@pytest.mark.slow
@pytest.mark.parametrize("share", [None, 0.0, 0.03, 2.0])
def test_the_record_adds_up_and_the_structure_term_gets_its_share_of_the_gradient(run, share):
    record = run(slice(2), weight_mode="fixed", structure_share=share, iterations=5)[0].record
    assert record.layer_losses.shape == (5, 5, len(record.layers), 2) and len(record.layers) == 10
    structure = (5 * record.weights[..., None] * record.layer_losses.sum(2)).sum(1)
    assert torch.allclose(structure, record.self_attention_loss)
    factors = 100 if share is None else record.self_attention_factor
    total = -10 * record.attack_loss + factors * structure + 10000 * record.cross_attention_loss
    assert torch.allclose(total, record.total_loss)
    assert (record.timestep_losses[0] == 0).all() and record.timesteps.tolist() == [201, 151, 101, 51, 1]
    if share is not None:
        norms = record.gradient_norms
        assert record.gradient_iterations == [2, 3, 5] and torch.allclose(norms[:, 1], share * norms[:, 0])
        assert (factors[0] == 0).all() and torch.equal(factors[2], factors[3])  # kept until it is renewed
        assert len(set(factors[1].tolist())) == (2 if share else 1)  # each image has its own


def test_modes_that_are_the_same_loss(run):
    """Fixed uniform weights and none; detached weights, which never move, and those that they start at."""

    def attacked(mode, schedule="learned", **options):
        return run(weight_mode=mode, weight_schedule=schedule, **options)[0]

    detached = attacked("learnable_detached", weight_lr=1.0)
    pairs = (attacked("fixed", "uniform"), attacked("uniform")), (attacked("fixed", "increasing"), detached)
    for one, other in pairs:
        assert torch.allclose(one.adversarial, other.adversarial, rtol=0, atol=1e-9)
    assert not torch.allclose(pairs[0][0].adversarial, detached.adversarial, rtol=0, atol=1e-6)
    assert torch.equal(detached.record.weights, detached.record.weights[:1].expand(4, -1))
    assert detached.record.weights[0].tolist() == pytest.approx(SCHEDULES["increasing"])


@pytest.mark.slow
def test_one_network_of_weights_goes_on_from_image_to_image_and_collapses(run):
    """Onto the smallest loss; from its state another goes on alike."""
    options = dict(weight_mode="learnable", weight_lr=0.05)
    result, whole, _ = run(iterations=30, **options)
    weights, losses = result.record.weights, result.record.timestep_losses[1:, :, 0]
    smallest = losses.mean(0).argmin()
    assert weights[0].tolist() == pytest.approx(SCHEDULES["increasing"])
    assert weights[-1].argmax() == smallest and weights[-1, smallest] > 0.9
    end, state = whole.controller.weights(), copy.deepcopy(whole.controller.state())
    _, fresh, inversion = run(slice(1, 2), **options)
    fresh.controller.load_state(state)
    anew, fresh.controller = fresh.attack(inversion).record.weights, whole.controller
    going_on = fresh.attack(inversion).record.weights
    assert torch.equal(going_on, anew) and torch.equal(anew[0], end)


@pytest.mark.slow
@pytest.mark.parametrize("mode, share", [("uniform", None), ("fixed", None), ("minimax", 0.3)])
def test_images_of_a_batch_do_not_influence_each_other(run, mode, share):
    together, _, _ = run(ALL, weight_mode=mode, structure_share=share)
    for k in range(3):
        alone, _, _ = run(slice(k, k + 1), weight_mode=mode, structure_share=share)
        ours, theirs = together.record.of_image(k), alone.record.of_image(0)
        assert torch.allclose(ours.weights, theirs.weights)
        assert torch.allclose(together.adversarial[k], alone.adversarial[0], rtol=0, atol=1e-9)
        assert torch.allclose(ours.layer_losses, theirs.layer_losses, rtol=1e-6, atol=1e-18)


@pytest.mark.slow
def test_mask_keeps_the_rest_of_the_image(run, images):
    soft, attack, inversion = run(is_apply_mask=True)
    hard, _, _ = run(is_hard_mask=True)
    with batch_after(attack, inversion) as batch:
        shown = batch.reference.class_attention
    mask = attention_mask(shown, inversion.class_tokens, images.shape[-2:])[0, 0]
    assert mask.max() == pytest.approx(1, abs=0.05)
    assert torch.equal(hard.adversarial[0][:, mask <= 0.5], images[0][:, mask <= 0.5])
    assert ((soft.adversarial - images[:1]).abs()[0] <= mask + 1e-12).all()


# ---------------------------------------------------------------- memory, and what is left behind


def test_checkpointing_starts_by_itself_where_memory_is_short(run, monkeypatch):
    calls, real = [], diff_latent_attack.recompute
    monkeypatch.setattr(diff_latent_attack, "recompute", lambda *given: calls.append(1) or real(*given))
    _, attack, inversion = run(iterations=1)
    with frozen(attack.unet), attack.controller.attached(attack.unet, attack.branches):
        needed = 5 * reference_run(attack, attack.controller.collecting, inversion).graph_bytes
    for share, expected in ((1.1, 0), (0.9, 6)):  # each timestep, and the decoder
        free = share * needed / attention.GRAPH_SHARE
        monkeypatch.setattr(attention, "free_memory", lambda device, free=free: free)
        calls.clear()
        attack.attack(inversion)
        assert len(calls) == expected


@pytest.mark.parametrize("checkpointing", [False, True])
def test_graphs_are_as_large_as_estimated(run, classifier, checkpointing):
    """What autograd really keeps for one iteration, counted from outside."""
    _, attack, inversion = run(iterations=1, checkpointing=checkpointing)
    with batch_after(attack, inversion) as batch:
        latents = batch.optimizer.latents
        with bytes_saved(attack.unet) as saved:
            attack.losses(attack.forward(batch, 1), batch, 2)
        with bytes_saved(attack.vae) as decoder:
            classifier(attack.decode(latents))
        kept, estimated = sum(saved) - sum(decoder), 5 * batch.reference.graph_bytes
    assert kept < 0.02 * estimated if checkpointing else kept == pytest.approx(estimated, rel=0.2)


class Failing(torch.nn.Module):
    def forward(self, x):
        raise RuntimeError("planned")


@pytest.mark.parametrize("fails", [False, True])
def test_everything_set_on_the_models_is_put_back(checkpoint, classifier, images, labels, fails):
    pipeline = checkpoint()
    victim = Failing() if fails else classifier
    modules = (pipeline.unet, pipeline.vae, pipeline.text_encoder, victim)
    pipeline.unet.train()
    next(pipeline.vae.parameters()).requires_grad_(False)

    def state():
        parameters = [p for module in modules for p in module.parameters()]
        set_on = [m.training for m in modules], [(p.requires_grad, p.grad) for p in parameters]
        scheduler = copy.deepcopy(dict(pipeline.scheduler.config)), type(pipeline.scheduler)
        return set_on, pipeline.unet.attn_processors, scheduler

    before = state()
    attack = build(pipeline, victim, iterations=1, guidance=1.0)
    with pytest.raises(RuntimeError, match="planned") if fails else contextlib.nullcontext():
        attack(images[:1], labels[:1])
    try:
        assert state() == before
    finally:
        pipeline.unet.eval()
        next(pipeline.vae.parameters()).requires_grad_(True)


# ---------------------------------------------------------------- several classifiers and labels, targets


@pytest.mark.slow
@pytest.mark.parametrize(
    "networks, classes, target, temperature",
    [([0, 1], [1], -1, 1.0), ([0], [1, 4], -1, 1.0), ([0], [1], 4, 1.0), ([0], [1], -1, 10.0)],
)
def test_the_mean_loss_of_classifiers_and_labels_is_attacked_or_that_of_a_target(
    checkpoint, classifier, images, networks, classes, target, temperature
):
    torch.manual_seed(5)
    other = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, 5))
    networks = [[classifier, other.double()][k] for k in networks]
    options = dict(iterations=8, guidance=1.0, logit_temperature=temperature)
    attack = build(checkpoint(), networks, **options)
    labels, targets = torch.tensor([classes]), torch.tensor([target])
    result = attack.attack(attack.invert(images[:1], labels, targets))
    record, wanted = result.record, [target] if target >= 0 else classes
    sign = 1 if target >= 0 else -1

    def loss(picture):
        answers = torch.stack([network(picture)[0] / temperature for network in networks])
        return -answers.log_softmax(-1)[:, wanted].mean().item()

    assert record.attack_loss[0, 0].item() == pytest.approx(loss(result.reconstruction), rel=1e-9)
    assert sign * loss(result.adversarial) < sign * record.attack_loss[0, 0] - 1e-3
    terms = 100 * record.self_attention_loss + 10000 * record.cross_attention_loss
    assert torch.allclose(sign * 10 * record.attack_loss + terms, record.total_loss)
    assert attack.prompts(labels) == [", ".join(CLASS_NAMES[k] for k in classes)]


def test_what_counts_as_fooled():
    logits = torch.nn.functional.one_hot(torch.tensor([1, 4, 2, 2, 3, 1]), 5).double()
    targets = torch.tensor([-1, -1, -1, 3, 3, 3])
    found = SOFTMAX.fooled(logits[None], torch.tensor([[1, 4]] * 6), targets)
    assert found.tolist() == [[False, False, True, False, True, False]]
