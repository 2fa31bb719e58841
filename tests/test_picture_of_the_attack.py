"""What the attack shows, how far it goes and when it ends: one branch, residual pictures, budgets, margins,
and pictures that are judged on the way; on random models, in float64.
"""

from dataclasses import replace

import numpy as np
import pytest
import reference
import torch
from conftest import CLASS_NAMES
from test_diff_latent_attack import batch_after, compare

from diff_latent_attack import DiffAttack
from diffattack.classifiers.defences import defend
from diffattack.classifiers.heads import SOFTMAX
from diffattack.common.errors import InputError, NonFiniteLossError
from diffattack.common.frozen import TORCHS_OWN, frozen
from diffattack.data.images import rounded
from diffattack.diffusion.composition import change_limits
from diffattack.evaluation.budget import parse_budget

# which a random model fools in some of its steps
ADAMW = dict(latent_optimizer="adamw", budget=None, contrast_limit=None, attack_through=())


def build(checkpoint, classifier, **options) -> DiffAttack:
    return DiffAttack(checkpoint(), classifier, CLASS_NAMES, **{"iterations": 4, **options})


def of_text(pipeline, scheduler, latents, null):
    """The reference's inversion, with the prompt."""
    return reference.invert(pipeline, scheduler, latents, reference.embed(pipeline, "polar bear"))


@pytest.mark.reference
@pytest.mark.slow
def test_one_branch_is_two_at_guidance_1(checkpoint, classifier, images):
    """Where the reference computes both, and its null-text optimisation comes to nothing."""
    options = dict(weight_mode="fixed", composition="decoder", checkpointing=True)
    attack = build(checkpoint, classifier, **options, **ADAMW)
    assert attack.invert(images[:1], torch.tensor([1])).null_embeddings == []
    weights = reference.weights_of(reference.BASE["learned"], 5)
    adversarial, expected, losses, history = compare(
        attack, classifier, images[:1], 1, "polar bear", weights, 4, guidance=1.0, inversion=of_text
    )
    np.testing.assert_allclose(losses, history, rtol=1e-6, atol=1e-18)
    assert (adversarial - expected).abs().max() <= 1e-6


def test_one_branch_asks_the_unet_for_half(checkpoint, classifier, images, labels):
    samples = []
    attack = build(checkpoint, classifier, iterations=1, **ADAMW)
    hook = attack.unet.register_forward_hook(lambda network, given, result: samples.append(len(given[0])))
    try:
        attack(images[:2], labels[:2])
    finally:
        hook.remove()
    assert samples == [2] * (5 + 5 + 2 * 5)  # inversion, reference, an iteration, and the look at its end


def test_a_residual_is_the_clean_picture_and_what_the_attack_adds(checkpoint, classifier, images, labels):
    attack = build(checkpoint, classifier, **ADAMW)
    inversion = attack.invert(images[:2], labels[:2])
    with frozen(attack.unet, attack.vae, classifier), attack.controller.attached(attack.unet, 1):
        batch = batch_after(attack, inversion, steps=3)
        latents = batch.optimizer.latents.detach()
        with torch.no_grad():
            shown = attack.forward(batch, 3).picture
            added = attack.reconstruct(replace(inversion, latents=latents)) - attack.reconstruct(inversion)
    assert torch.allclose(shown, (images[:2] + added).clamp(0, 1), rtol=0, atol=1e-12)
    assert added.abs().mean() > 1e-3 and attack.attack(inversion).reconstruction is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer, budget",
    [("momentum", "psnr=30"), ("momentum", "ssim=0.97"), ("momentum", "l2=4"), ("adamw", "l2=4")],
)
def test_every_picture_is_within_the_budget(checkpoint, classifier, images, labels, budget, optimizer):
    options = dict(latent_optimizer=optimizer, latent_lr=0.008, attack_through=(), iterations=6)
    attack = build(checkpoint, classifier, budget=budget, judge_at=(1, 2, 3, 4, 5, 6), **options)
    result = attack(images, labels)
    for pictures in (result.adversarial, *result.pictures_at.values()):
        assert parse_budget(budget).fits(images, pictures).all()
    assert (result.adversarial - images).flatten(1).norm(dim=1).min() > 0.5
    if optimizer == "adamw":  # the last picture within it: the next one of a run without it is beyond
        free = build(checkpoint, classifier, judge_at=(1, 2, 3, 4, 5, 6), **options | {"budget": None})
        beyond = free(images, labels).pictures_at
        for k, steps in enumerate(result.steps.tolist()):
            assert torch.allclose(result.adversarial[k], beyond[max(1, steps)][k]) or steps == 0
            if steps < 6:
                assert not parse_budget(budget).fits(images, beyond[steps + 1])[k]


def test_no_pixel_of_a_limited_picture_changes_by_more(checkpoint, classifier, images, labels):
    result = build(checkpoint, classifier, contrast_limit=0.4, budget="l2=9")(images, labels)
    assert ((result.adversarial - images).abs() <= change_limits(images, 0.4)[:, :1] + 1e-9).all()


def test_pictures_on_the_way_are_those_of_shorter_runs(checkpoint, classifier, images, labels):
    whole = build(checkpoint, classifier, judge_at=(1, 3), **ADAMW)(images[:2], labels[:2])
    assert sorted(whole.pictures_at) == [1, 3] and whole.steps.tolist() == [4, 4] and whole.reached is None
    for steps, pictures in whole.pictures_at.items():
        shorter = build(checkpoint, classifier, iterations=steps, **ADAMW)(images[:2], labels[:2])
        assert torch.allclose(pictures, shorter.adversarial, rtol=0, atol=1e-12)


class Counting(torch.nn.Module):
    """How many images a classifier is asked about under attack."""

    def __init__(self, classifier):
        super().__init__()
        self.classifier, self.asked = classifier, []

    def forward(self, x):
        if x.requires_grad:
            self.asked.append(len(x))
        return self.classifier(x)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode, optimizer", [("fixed", "momentum"), ("minimax", "adamw"), ("balanced", "momentum")]
)
def test_an_image_ends_at_its_margin_whoever_is_beside_it(
    checkpoint, classifier, images, labels, mode, optimizer
):
    options = dict(weight_mode=mode, iterations=6, latent_optimizer=optimizer, latent_lr=0.02)
    # which momentum keeps within; AdamW would end where it is exceeded
    options |= dict(budget="l2=8" if optimizer == "momentum" else None)
    options |= dict(attack_through=(), contrast_limit=None)
    free = build(checkpoint, classifier, judge_at=tuple(range(1, 7)), **options)(images, labels)
    targets, ways = torch.full((3,), -1), {0: images, **free.pictures_at}
    with torch.no_grad():
        margins = torch.stack(
            [SOFTMAX.margin(classifier(rounded(ways[k])), labels[:, None], targets) for k in sorted(ways)]
        )  # (7, B), from no step on
    wanted = margins[4].median().item() - 1e-6  # some image reaches it after four steps
    counting = Counting(classifier)
    attack = build(checkpoint, counting, stop_margin=wanted, judge_at=(6,), **options)
    result = attack(images, labels)
    for k in range(3):
        reached = (margins[:, k] >= wanted).nonzero().view(-1)
        assert result.reached[k] == bool(len(reached))
        assert result.steps[k] == (reached[0] if len(reached) else 6)
        whole, part = ways[result.steps[k].item()][k] - images[k], result.adversarial[k] - images[k]
        factor = part.norm() / whole.norm() if part.norm() else torch.tensor(0.0)
        assert torch.allclose(part, factor * whole, rtol=0, atol=1e-9)
        if len(reached):  # no more of its change than is needed
            held = [images[k] + (factor + extra) * whole for extra in (0, -1 / 250)]
            enough, less = SOFTMAX.margin(
                classifier(rounded(torch.stack(held))), labels[[k, k], None], targets[:2]
            )
            assert enough >= wanted and (less < wanted or factor < 1 / 250)
        else:
            assert factor == pytest.approx(1)
        alone = build(checkpoint, classifier, stop_margin=wanted, **options)
        single = alone(images[k : k + 1], labels[k : k + 1])
        assert torch.allclose(single.adversarial[0], result.adversarial[k], rtol=0, atol=1e-9)
        ours, theirs = result.record.of_image(k), single.record.of_image(0)
        assert torch.allclose(ours.total_loss, theirs.total_loss, equal_nan=True, rtol=1e-6)
        assert torch.allclose(ours.weights, theirs.weights)
    assert torch.equal(result.pictures_at[6], result.adversarial)
    steps = result.steps.clamp(max=5) + 1  # an image is looked at once more, to see that it has ended
    assert counting.asked == [int((steps > k).sum()) for k in range(steps.max())]
    losses = result.record.total_loss  # (6, B), nothing after the end
    assert torch.equal(losses.isfinite().sum(0), steps)


def test_an_image_that_ends_where_gradients_are_measured_is_not_measured_for_its_neighbour(
    checkpoint, classifier, images, labels
):
    options = dict(structure_share=0.3, contrast_limit=None, budget="l2=8", attack_through=())
    free = build(checkpoint, classifier, judge_at=(1,), **options)(images, labels).pictures_at[1]
    with torch.no_grad():
        margins = SOFTMAX.margin(classifier(rounded(free)), labels[:, None], torch.full((3,), -1))
    order = margins.argsort(descending=True)[[0, 2]]  # the first of them ends before iteration 2
    attack = build(checkpoint, classifier, stop_margin=margins.max().item() - 1e-6, **options)
    together, alone = (attack(images[some], labels[some]) for some in (order, order[:1]))
    assert together.steps.tolist()[0] == alone.steps.tolist()[0] == 1 < together.steps.tolist()[1]
    ours, theirs = together.of_image(0), alone.of_image(0)
    assert torch.allclose(ours.adversarial, theirs.adversarial, rtol=0, atol=1e-9)
    for name in ("gradient_norms", "self_attention_factor", "total_loss", "class_attention", "components"):
        found, expected = getattr(ours.record, name).double(), getattr(theirs.record, name).double()
        assert torch.allclose(found, expected, equal_nan=True, rtol=1e-6, atol=1e-6), name


def test_a_loss_that_is_not_finite_names_the_image_among_all_that_were_given(
    checkpoint, classifier, images, labels
):
    class Spoilt(torch.nn.Module):
        """Of the last image, once another has left the batch."""

        def forward(self, x):
            factor = torch.ones(len(x), 1, dtype=x.dtype)
            factor[-1] = torch.nan if x.requires_grad and len(x) == 2 else 1
            return classifier(x) * factor

    with torch.no_grad():
        given = classifier(rounded(images)).argmax(-1)
    given[1] = (given[1] + 1) % 5  # wrong, so that it ends at once
    attack = build(checkpoint, Spoilt(), stop_margin=0.0, budget="l2=4")
    with pytest.raises(NonFiniteLossError) as caught:
        attack(images, given)
    assert (caught.value.index, caught.value.iteration) == (2, 2)
    assert not attack.unet.training and torch.nn.Conv2d._conv_forward is TORCHS_OWN


def test_an_image_that_is_wrong_before_ends_as_it_was(checkpoint, classifier, images):
    with torch.no_grad():
        wrong = (classifier(rounded(images[:1])).argmax(-1) + 1) % 5
    result = build(checkpoint, classifier, stop_margin=0.0)(images[:1], wrong)
    assert result.steps.tolist() == [0] and result.reached.tolist() == [True]
    assert torch.equal(rounded(result.adversarial), rounded(images[:1]))


def test_a_margin_is_of_the_true_classes_or_of_the_target():
    logits = torch.tensor([[[1.0, 4.0, 2.0, 0.5]]])
    labels, none = torch.tensor([[0, 2]]), torch.tensor([-1])
    assert SOFTMAX.margin(logits, labels, none).tolist() == [[2.0]]
    assert SOFTMAX.margin(logits, torch.tensor([[1, -1]]), none).tolist() == [[-2.0]]
    assert SOFTMAX.margin(logits, labels, torch.tensor([3])).tolist() == [[-3.5]]
    assert SOFTMAX.margin(logits, labels, torch.tensor([1])).tolist() == [[2.0]]


def test_attacked_through_a_defence_and_judged_without(checkpoint, classifier, images, labels):
    """Other pictures than without it, and those of the classifier behind it."""
    options = dict(iterations=2, budget="l2=4")
    through, plain, behind = (
        build(checkpoint, one, attack_through=defences, **options)(images[:1], labels[:1]).adversarial
        for one, defences in (
            (classifier, ("blur:2",)),
            (classifier, ()),
            (defend(classifier, ["blur:2"]), ()),
        )
    )
    assert not torch.allclose(through, plain, atol=1e-6)
    assert torch.allclose(through, behind, rtol=0, atol=1e-12)
    assert build(checkpoint, classifier, attack_through=("blur:2",)).classifiers == [classifier]


def test_masks_of_ones_own(checkpoint, classifier, images, labels):
    masks = torch.zeros(2, 1, 64, 64)
    masks[0, :, :32], masks[1, :, :, 40:] = 1.0, 0.6
    soft, hard = (
        build(checkpoint, classifier, is_hard_mask=is_hard)(rounded(images[:2]), labels[:2], masks=masks)
        for is_hard in (False, True)
    )
    for result in (soft, hard):
        change = result.adversarial - rounded(images[:2])
        assert (change[0, :, 32:] == 0).all() and (change[1, :, :, :40] == 0).all()
        assert (change[0, :, :32] != 0).any() and (change[1, :, :, 40:] != 0).any()
    assert hard.adversarial[1].sub(images[1]).norm() > 0


def test_defaults_that_depend_on_others_and_options_that_cannot_be_meant(checkpoint, classifier):
    attack = DiffAttack(checkpoint(), classifier, CLASS_NAMES, stop_margin=5.0)
    assert attack.options.iterations == 20 and attack.options.attack_through == ()
    with pytest.raises(InputError, match="preset is for command lines; give .*ATTACK_PRESETS"):
        DiffAttack(checkpoint(), classifier, CLASS_NAMES, preset="diffattack")
    with pytest.raises(InputError, match="--judge_at goes beyond the 4 of --iterations"):
        build(checkpoint, classifier, judge_at=(2, 9))
