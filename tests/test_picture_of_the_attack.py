"""What the attack shows, how far it goes and when it ends: one branch, residual pictures, budgets, margins,
pictures that are judged on the way, and compiled blocks; on random models, in float64.
"""

import shutil
from dataclasses import replace

import pytest
import torch
import torch._inductor.config
from conftest import CLASS_NAMES
from test_composition import around
from test_diff_latent_attack import batch_after

from diff_latent_attack import DiffAttack
from diffattack.classifiers.defences import defend
from diffattack.classifiers.heads import SOFTMAX
from diffattack.common.errors import InputError, NonFiniteLossError
from diffattack.data.images import rounded
from diffattack.diffusion.composition import change_limits
from diffattack.diffusion.pipeline import compile_blocks
from diffattack.evaluation.budget import parse_budget

# which a random model fools in some of its steps
WHOLE = dict(contrast_limit=0.0, high_pass=0.0, colour=1.0)
ADAMW = dict(latent_optimizer="adamw", budget=None, attack_through=(), **WHOLE)
NONE = torch.full((3,), -1)


def build(checkpoint, classifier, **options) -> DiffAttack:
    return DiffAttack(checkpoint(), classifier, CLASS_NAMES, **{"iterations": 4, **options})


def test_one_branch_asks_the_unet_for_half(checkpoint, classifier, images, labels):
    samples = []
    attack = build(checkpoint, classifier, iterations=1, **ADAMW)
    hook = attack.unet.register_forward_hook(lambda network, given, result: samples.append(len(given[0])))
    try:
        inversion = attack.invert(images[:2], labels[:2])
        attack.attack(inversion)
    finally:
        hook.remove()
    assert inversion.null_embeddings == []
    assert samples == [2] * (5 + 5 + 2 * 5)  # inversion, reference, an iteration, and the look at its end


def test_a_residual_is_the_clean_picture_and_what_the_attack_adds(checkpoint, classifier, images, labels):
    attack = build(checkpoint, classifier, **ADAMW)
    inversion = attack.invert(images[:2], labels[:2])
    with batch_after(attack, inversion, steps=3) as batch, torch.no_grad():
        latents = batch.optimizer.latents.detach()
        shown = attack.forward(batch, 3).picture
        added = attack.reconstruct(replace(inversion, latents=latents)) - attack.reconstruct(inversion)
    assert torch.allclose(shown, (images[:2] + added).clamp(0, 1), rtol=0, atol=1e-12)
    assert added.abs().mean() > 1e-3 and attack.attack(inversion).reconstruction is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer, budget, limit",
    [("momentum", "psnr=30", 0.4), ("momentum", "ssim=0.97", 1), ("adamw", "l2=4", 1)],
)
def test_every_picture_is_within_the_budget_and_the_limit(
    checkpoint, classifier, images, labels, budget, optimizer, limit
):
    options = dict(latent_optimizer=optimizer, latent_lr=0.008, attack_through=(), iterations=6)
    options |= dict(judge_at=(1, 2, 3, 4, 5, 6), contrast_limit=limit)
    result = build(checkpoint, classifier, budget=budget, **options)(images, labels)
    for pictures in (result.adversarial, *result.pictures_at.values()):
        assert parse_budget(budget).fits(images, pictures).all()
        assert (around(pictures - images) <= 1.5 * change_limits(images, limit)).all()
    assert (result.adversarial - images).flatten(1).norm(dim=1).min() > 0.5
    if optimizer == "adamw":  # the last picture within it: the next one of a run without it is beyond
        beyond = build(checkpoint, classifier, budget=None, **options)(images, labels).pictures_at
        for k, steps in enumerate(result.steps.tolist()):
            assert torch.allclose(result.adversarial[k], beyond[max(1, steps)][k]) or steps == 0
            if steps < 6:
                assert not parse_budget(budget).fits(images, beyond[steps + 1])[k]


@pytest.mark.slow
def test_pictures_on_the_way_are_those_of_shorter_runs(checkpoint, classifier, images, labels):
    whole = build(checkpoint, classifier, judge_at=(1, 3), **ADAMW)(images[:1], labels[:1])
    assert sorted(whole.pictures_at) == [1, 3] and whole.steps.tolist() == [4] and whole.reached is None
    for steps, pictures in whole.pictures_at.items():
        shorter = build(checkpoint, classifier, iterations=steps, **ADAMW)(images[:1], labels[:1])
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
@pytest.mark.parametrize("mode, optimizer", [("minimax", "adamw"), ("balanced", "momentum")])
def test_an_image_ends_at_its_margin_whoever_is_beside_it(
    checkpoint, classifier, images, labels, mode, optimizer
):
    # budgets which momentum keeps within; AdamW would end where it is exceeded
    options = ADAMW | dict(budget="l2=8" if optimizer == "momentum" else None)
    options |= dict(weight_mode=mode, iterations=6, latent_optimizer=optimizer, latent_lr=0.02)
    free = build(checkpoint, classifier, judge_at=tuple(range(1, 7)), **options)(images, labels)
    ways = {0: images, **free.pictures_at}
    with torch.no_grad():
        answers = [classifier(rounded(ways[k])) for k in sorted(ways)]
        margins = torch.stack([SOFTMAX.margin(logits, labels[:, None], NONE) for logits in answers])  # (7, B)
    wanted = margins[4].median().item() - 1e-6  # some image reaches it after four steps
    counting = Counting(classifier)
    result = build(checkpoint, counting, stop_margin=wanted, judge_at=(6,), **options)(images, labels)
    alone = build(checkpoint, classifier, stop_margin=wanted, **options)
    for k in range(3):
        reached = (margins[:, k] >= wanted).nonzero().view(-1)
        assert result.reached[k] == bool(len(reached))
        assert result.steps[k] == (reached[0] if len(reached) else 6)
        whole, part = ways[result.steps[k].item()][k] - images[k], result.adversarial[k] - images[k]
        factor = part.norm() / whole.norm() if part.norm() else torch.tensor(0.0)
        assert torch.allclose(part, factor * whole, rtol=0, atol=1e-9)
        if len(reached):  # no more of its change than is needed
            held = torch.stack([images[k] + (factor + extra) * whole for extra in (0, -1 / 250)])
            enough, less = SOFTMAX.margin(classifier(rounded(held)), labels[[k, k], None], NONE[:2])
            assert enough >= wanted and (less < wanted or factor < 1 / 250)
        else:
            assert factor == pytest.approx(1)
        single = alone(images[k : k + 1], labels[k : k + 1])
        assert torch.allclose(single.adversarial[0], result.adversarial[k], rtol=0, atol=1e-9)
        ours, theirs = result.record.of_image(k), single.record.of_image(0)
        assert torch.allclose(ours.total_loss, theirs.total_loss, equal_nan=True, rtol=1e-6)
        assert torch.allclose(ours.weights, theirs.weights)
    assert torch.equal(result.pictures_at[6], result.adversarial)
    steps = result.steps.clamp(max=5) + 1  # an image is looked at once more, to see that it has ended
    assert counting.asked == [int((steps > k).sum()) for k in range(steps.max())]
    assert torch.equal(result.record.total_loss.isfinite().sum(0), steps)  # nothing after the end


@pytest.mark.slow
def test_an_image_that_ends_where_gradients_are_measured_is_not_measured_for_its_neighbour(
    checkpoint, classifier, images, labels
):
    options = dict(structure_share=0.3, budget="l2=8", attack_through=(), **WHOLE)
    free = build(checkpoint, classifier, judge_at=(1,), **options)(images, labels).pictures_at[1]
    with torch.no_grad():
        margins = SOFTMAX.margin(classifier(rounded(free)), labels[:, None], NONE)
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
        """Of the last image, once another, which is wrong before, has left the batch."""

        def forward(self, x):
            factor = torch.ones(len(x), 1, dtype=x.dtype)
            factor[-1] = torch.nan if x.requires_grad and len(x) == 2 else 1
            return classifier(x) * factor

    with torch.no_grad():
        given = classifier(rounded(images)).argmax(-1)
    given[1] = (given[1] + 1) % 5
    options = dict(stop_margin=0.0, budget="l2=4")
    attack = build(checkpoint, Spoilt(), **options)
    with pytest.raises(NonFiniteLossError) as caught:
        attack(images, given)
    assert (caught.value.index, caught.value.iteration) == (2, 2)
    assert not attack.unet.training
    result = build(checkpoint, classifier, **options)(images[1:2], given[1:2])  # ends as it was
    assert result.steps.tolist() == [0] and result.reached.tolist() == [True]
    assert torch.equal(rounded(result.adversarial), rounded(images[1:2]))


def test_a_margin_is_of_the_true_classes_or_of_the_target():
    logits = torch.tensor([[[1.0, 4.0, 2.0, 0.5]]])
    for labels, target, margin in (([0, 2], -1, 2), ([1, -1], -1, -2), ([0, 2], 3, -3.5), ([0, 2], 1, 2)):
        assert SOFTMAX.margin(logits, torch.tensor([labels]), torch.tensor([target])).tolist() == [[margin]]


def test_attacked_through_a_defence_and_judged_without(checkpoint, classifier, images, labels):
    """Other pictures than without it, and those of the classifier behind it."""
    options = dict(iterations=2, budget="l2=4")
    given = (classifier, ("blur:2",)), (classifier, ()), (defend(classifier, ["blur:2"]), ())
    attacks = [build(checkpoint, one, attack_through=through, **options) for one, through in given]
    through, plain, behind = (attack(images[:1], labels[:1]).adversarial for attack in attacks)
    assert not torch.allclose(through, plain, atol=1e-6)
    assert torch.allclose(through, behind, rtol=0, atol=1e-12)
    assert attacks[0].classifiers == [classifier]


@pytest.mark.parametrize("is_hard", [False, True])
def test_masks_of_ones_own(checkpoint, classifier, images, labels, is_hard):
    masks, clean = torch.zeros(2, 1, 64, 64), rounded(images[:2])
    masks[0, :, :32], masks[1, :, :, 40:] = 1.0, 0.6
    attack = build(checkpoint, classifier, is_hard_mask=is_hard, iterations=2)
    change = attack(clean, labels[:2], masks=masks).adversarial - clean
    assert torch.equal(change[0].abs().amax((0, 2)) > 0, torch.arange(64) < 32)
    assert torch.equal(change[1].abs().amax((0, 1)) > 0, torch.arange(64) >= 40)


def test_options_that_cannot_be_meant(checkpoint, classifier):
    for options, message in (
        (dict(preset="diffattack"), "preset is for command lines; give .*ATTACK_PRESETS"),
        (dict(judge_at=(2, 9)), "--judge_at goes beyond the 4 of --iterations"),
        (dict(start_step=20), "start_step"),
    ):
        with pytest.raises(InputError, match=message):
            build(checkpoint, classifier, **options)


# ---------------------------------------------------------------- torch.compile


def test_without_a_compiler_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # nothing that was compiled before
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, str(tmp_path / "none")))
    with pytest.raises(InputError, match="--compile: torch.compile cannot be used here .* leave --") as error:
        compile_blocks([torch.nn.Linear(1, 1)])
    assert "\n" not in str(error.value)


@pytest.mark.nightly
@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler here")
def test_a_compiled_block_attacks_as_an_eager_one_does(checkpoint, classifier, images, labels):
    options = dict(iterations=2, weight_mode="fixed", attack_through=(), contrast_limit=0)
    eager = build(checkpoint, classifier, **options)
    inversion = eager.invert(images[:1], labels[:1])
    expected = eager.attack(inversion)
    quick = build(checkpoint, classifier, **options)
    compile_blocks([quick.unet.mid_block.attentions[0]])
    torch._dynamo.utils.counters.clear()
    found = quick.attack(inversion)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # for what is learnt from, and no more
    assert torch.allclose(found.adversarial, expected.adversarial, rtol=0, atol=1e-9)
    assert torch.allclose(found.record.gradient_norms, expected.record.gradient_norms, rtol=1e-6)
    assert torch.allclose(found.record.layer_losses, expected.record.layer_losses, rtol=1e-5, atol=1e-18)
