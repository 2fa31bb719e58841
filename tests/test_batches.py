"""Images that come and go while others are attacked, against each by itself."""

import pytest
import torch
from test_picture_of_the_attack import build

from diffattack.classifiers.heads import SOFTMAX
from diffattack.common.errors import NonFiniteLossError
from diffattack.data.images import rounded

DRAWS = dict(attack_through=("resize:0.8",), draws=2)


def in_turn(attack, images, labels, size):
    """All results by place, which images ended together, and how many came each time."""
    came, results, together, waiting = [], {}, [], list(range(len(images)))

    def newcomers(room):
        rows, waiting[:] = waiting[:room], waiting[room:]
        came.append(len(rows))
        return attack.invert(images[rows], labels[rows]) if rows else None

    for ended in attack.attack_in_turn(newcomers, size):
        together.append(sorted(ended))
        results |= ended
    return results, together, came


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode, optimizer, more",
    [
        ("minimax", "momentum", DRAWS),
        ("balanced", "adamw", dict(structure_share=0.3, attack_through=())),
    ],
)
def test_others_take_the_places_of_those_that_have_ended(
    checkpoint, classifier, images, labels, mode, optimizer, more
):
    options = dict(weight_mode=mode, iterations=5, latent_optimizer=optimizer, latent_lr=0.02)
    options |= dict(contrast_limit=None, budget="l2=8" if optimizer == "momentum" else None) | more
    many = torch.cat([images, images.flip(-1)])[:5]
    true = torch.cat([labels, labels])[:5]
    free = build(checkpoint, classifier, judge_at=tuple(range(1, 6)), **options)(many, true).pictures_at
    with torch.no_grad():
        none = torch.full((5,), -1)
        margins = torch.stack(
            [SOFTMAX.margin(classifier(rounded(free[k])), true[:, None], none) for k in range(1, 6)]
        )
    options["stop_margin"] = max(0.0, margins[2].median().item() - 1e-6)
    # first one that ends early, and beside it one that ends late or never
    order = (margins >= options["stop_margin"]).sum(0).argsort(descending=True)[[0, 4, 1, 2, 3]]
    many, true = many[order], true[order]
    results, together, came = in_turn(build(checkpoint, classifier, **options), many, true, 2)
    assert sorted(results) == list(range(5)) and sum(came) == 5
    steps = [int(results[k].steps[0]) for k in range(5)]
    assert len(set(steps)) > 1 and came[:2] == [2, 1], steps  # while another was on its way
    for k in range(5):
        alone = build(checkpoint, classifier, **options)(many[k : k + 1], true[k : k + 1])
        assert torch.allclose(results[k].adversarial, alone.adversarial, rtol=0, atol=1e-9)
        assert results[k].steps.tolist() == alone.steps.tolist()
        ours, theirs = results[k].record.of_image(0), alone.record.of_image(0)
        assert torch.allclose(ours.total_loss, theirs.total_loss, equal_nan=True, rtol=1e-6)
        assert torch.allclose(ours.weights, theirs.weights)
        assert torch.allclose(ours.gradient_norms, theirs.gradient_norms, equal_nan=True, rtol=1e-6)
        assert ours.class_tokens == theirs.class_tokens


def test_images_that_end_together_are_followed_by_as_many(checkpoint, classifier, images, labels):
    attack = build(checkpoint, classifier, iterations=1, budget="l2=4")
    results, together, came = in_turn(attack, images, labels, 2)
    assert together == [[0, 1], [2]] and came == [2, 1, 0]
    whole = attack(images, labels)
    for k in range(3):
        assert torch.allclose(results[k].adversarial[0], whole.adversarial[k], rtol=0, atol=1e-9)


def test_a_loss_that_is_not_finite_names_the_image_by_the_order_in_which_it_came(
    checkpoint, classifier, images, labels
):
    class Spoilt(torch.nn.Module):
        asked = 0

        def forward(self, x):
            Spoilt.asked += x.requires_grad
            return classifier(x) * (torch.nan if Spoilt.asked > 3 else 1)

    attack = build(checkpoint, Spoilt(), iterations=2, budget="l2=4", attack_through=())
    with pytest.raises(NonFiniteLossError) as caught:
        in_turn(attack, images, labels, 1)
    assert (caught.value.index, caught.value.iteration) == (1, 2)
    assert not attack.unet.training and all("_conv_forward" not in vars(m) for m in attack.unet.modules())


def test_an_image_that_ends_where_gradients_are_measured_is_not_measured_for_its_neighbour(
    checkpoint, classifier, images, labels
):
    options = dict(iterations=4, structure_share=0.3, contrast_limit=None, budget="l2=8", attack_through=())
    free = build(checkpoint, classifier, judge_at=(1,), **options)(images, labels).pictures_at[1]
    with torch.no_grad():
        margins = SOFTMAX.margin(classifier(rounded(free)), labels[:, None], torch.full((3,), -1))
    order = margins.argsort(descending=True)[[0, 2]]  # the first of them ends before iteration 2
    attack = build(checkpoint, classifier, stop_margin=margins.max().item() - 1e-6, **options)
    together = attack(images[order], labels[order])
    alone = attack(images[order[:1]], labels[order[:1]])
    assert together.steps.tolist()[0] == alone.steps.tolist()[0] == 1 < together.steps.tolist()[1]
    ours, theirs = together.record.of_image(0), alone.record.of_image(0)
    for name in ("gradient_norms", "self_attention_factor", "total_loss"):
        found, expected = getattr(ours, name).double(), getattr(theirs, name).double()
        assert torch.allclose(found, expected, equal_nan=True, rtol=1e-6), name
