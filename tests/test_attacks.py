"""Attacks on pixels: what a name may be, the limit and the budget that hold for every attack, what they cost,
and runs and comparisons of them.
"""

import json

import numpy as np
import pytest
import torch
import torchattack
from conftest import MAIN, flags, network, pictures, run, succeed
from PIL import Image
from test_compare import COMPARE
from test_composition import around

from diffattack.attacks.library import attack_names, parse_attack
from diffattack.attacks.limited import strongest
from diffattack.attacks.pixel import PixelAttack, Surrogates
from diffattack.classifiers.registry import load_classifier
from diffattack.common.device import measured
from diffattack.data.images import read_image, read_pair, rounded, to_tensor
from diffattack.data.layout import Layout
from diffattack.diffusion.batch import stacked
from diffattack.diffusion.composition import Composition, change_limits
from diffattack.evaluation.budget import parse_budget

RANDOM = torch.Generator().manual_seed(0)
SMOOTH = torch.nn.functional.interpolate(
    torch.rand(1, 3, 12, 12, generator=RANDOM) * 0.6 + 0.2, (64, 64), mode="bicubic"
).clamp(0, 1)
CLEAN = rounded(SMOOTH + 0.05 * torch.randn(1, 3, 64, 64, generator=RANDOM))
LABEL = torch.tensor([2])


def classifier() -> torch.nn.Module:
    return network(5).requires_grad_(False)


def test_arguments_are_literals_and_fractions_and_every_attack_has_a_folder_of_its_own():
    name = parse_attack(" torchattack:DIFGSM(eps=8/255, steps=20,resize_rate=-0.5) ")
    assert (name.source, name.function) == ("torchattack", "DIFGSM")
    assert name.arguments == {"eps": 8 / 255, "steps": 20, "resize_rate": -0.5}
    several = ("diffattack", "torchattack:PGD(eps=0.1,steps=2)", "my attacks/f.py:g(a='x,)y',sizes=(1, 2))")
    assert attack_names(f"{several[0]}, {several[1]} ,{several[2]}") == several
    texts = "diffattack torchattack:PGD torchattack:PGD(eps=8/255) torchattack:PGD(eps=4/255)".split()
    texts += ["a/x.py:f", "b/x.py:f", *(f"x.py:f(text='{'long' * 50}{k}')" for k in range(2))]
    folders = [parse_attack(text).folder for text in texts]
    assert len({folder.lower() for folder in folders}) == len(texts)
    assert all(len(folder) < 100 and "/" not in folder for folder in folders)


# ---------------------------------------------------------------- the limit and the budget


def test_the_limit_has_its_gradient_and_comes_before_what_an_attack_does_to_a_picture():
    """Against the same steps written out: PGD with the limit, and DI-FGSM through which no copy goes that is
    not limited.
    """
    model, fine = classifier(), dict(high_pass=1.0, colour=0.3)
    composition = Composition(CLEAN, CLEAN, change_limits(CLEAN, 0.3), **fine)
    loss = torch.nn.functional.cross_entropy
    change = torch.zeros_like(CLEAN, requires_grad=True)
    for _ in range(4):
        (gradient,) = torch.autograd.grad(loss(model(composition(CLEAN + change)), LABEL), change)
        step = (change + 0.1 / 4 * gradient.sign()).clamp(-0.1, 0.1)
        change = ((CLEAN + step).clamp(0, 1) - CLEAN).detach().requires_grad_()
    name = "torchattack:PGD(eps=0.1,steps=4,random_start=False)"
    made = PixelAttack(name, model, range(5), contrast_limit=0.3, **fine)(CLEAN, LABEL).adversarial
    assert torch.allclose(made, composition(CLEAN + change.detach()), atol=1e-6)
    for name in ("DIFGSM", "SINIFGSM", "VMIFGSM"):
        attack = PixelAttack(f"torchattack:{name}(eps=0.5,steps=3)", model, range(5), contrast_limit=0.3)
        made = attack(CLEAN, LABEL).adversarial
        # limits change from place to place
        assert (around(made - CLEAN) <= 1.3 * change_limits(CLEAN, 0.3)).all()
        assert loss(model(made), LABEL) > loss(model(CLEAN), LABEL)


def test_a_mask_holds_every_attack():
    mask = (torch.arange(64) < 32).float().expand(1, 1, 64, 64)
    made = PixelAttack("torchattack:PGD", classifier(), range(5))(CLEAN, LABEL, masks=mask).adversarial
    assert torch.equal(made[..., 32:], CLEAN[..., 32:]) and (made - CLEAN)[..., :32].abs().max() > 0.02


def test_a_batch_gives_what_single_images_give():
    images, labels = torch.cat([CLEAN, CLEAN.flip(-1) ** 2]), torch.tensor([[2, 4], [1, -1]])
    attack = PixelAttack("torchattack:MIFGSM(steps=3)", classifier(), range(5), budget=parse_budget("l2=3"))
    together = attack(images, labels)
    for k in range(2):
        alone, ours = attack(images[k : k + 1], labels[k : k + 1]), together.of_image(k)
        assert torch.equal(ours.adversarial, alone.adversarial) and ours.searches == alone.searches
        assert ours.steps.tolist() == alone.steps.tolist() == [3]
        for name in ("attack_loss", "total_loss", "confidence", "fooled", "weights"):
            assert torch.equal(getattr(ours.record, name), getattr(alone.record.of_image(0), name)), name


def test_after_its_end_nothing_is_known_of_a_loss_and_a_verdict_stays():
    rows = [(torch.tensor([0, 1]), [1.0, 2.0]), (torch.tensor([1]), [3.0])]
    history = [(at, {"loss": torch.tensor(each), "fooled": torch.tensor(each) > 1}) for at, each in rows]
    arrays = stacked(history, 2, 4)
    nan = torch.nan
    expected = torch.tensor([[1.0, 2.0], [nan, 3.0], [nan, nan], [nan, nan]])
    assert torch.equal(arrays["loss"].nan_to_num(-1), expected.nan_to_num(-1))
    assert arrays["fooled"].tolist() == [[False, True]] * 4


DIRECTION = torch.randn(CLEAN.shape, generator=RANDOM)


@pytest.mark.parametrize("text", ["psnr=37", "ssim=0.97", "l2=1.5"])
@pytest.mark.parametrize(
    "attack",
    [
        lambda radius: CLEAN + radius * DIRECTION,
        lambda radius: CLEAN + 0.03 * (radius * DIRECTION / 0.03).tanh(),  # held back
        lambda radius: CLEAN + round(radius * 255) / 255 * DIRECTION.sign(),  # in jumps
        lambda radius: CLEAN + 0.001 * (radius > 0.5) * DIRECTION,  # hardly anything
        lambda radius: CLEAN + (0.2 + radius) * DIRECTION,  # never within, but by a part of it
    ],
)
def test_the_strongest_picture_within_a_budget_is_found(text, attack):
    budget = parse_budget(text)
    made = []

    def counted(radius):
        made.append(attack(radius).clamp(0, 1))
        return made[-1]

    found, _, runs = strongest(counted, CLEAN, budget, 8 / 255)
    assert budget.fits(CLEAN, found).all() and runs == len(made) <= 7
    assert len({picture.sum().item() for picture in made}) >= len(made) - 2  # hardly one is made twice
    share = float(budget.share(CLEAN, rounded(found)))
    could = max(float(budget.share(CLEAN, rounded(picture))) for picture in (*made, attack(10.0).clamp(0, 1)))
    assert share > 0.95 or share == pytest.approx(could, rel=0.03)


def test_several_surrogates_and_several_labels():
    two = [classifier(), network(5).requires_grad_(False)]
    with torch.no_grad():
        two[1][2].weight.mul_(-1)
    logits = torch.stack([model(CLEAN) for model in two]).mean(0)
    assert torch.allclose(Surrogates(two, torch.tensor([[2]]), 2.0)(CLEAN), logits / 2)
    together = Surrogates(two, torch.tensor([[2, 4, -1]]), 1.0)(CLEAN).softmax(-1)[0]
    assert together[2] == pytest.approx(float(logits.softmax(-1)[0, [2, 4]].sum()), rel=1e-5)
    assert together[4] == 0


def test_evaluations_are_counted_by_image_and_in_both_directions():
    model = classifier()
    with measured({"surrogate": [model]}, torch.device("cpu")) as costs:
        model(CLEAN.expand(3, -1, -1, -1))
        model(CLEAN.clone().requires_grad_()).sum().backward()
    model(CLEAN)
    assert costs.counts == {"surrogate": 4, "surrogate, backward": 1} and costs.peak_memory > 1e7


# ---------------------------------------------------------------- runs


def given(data, out, *extra) -> list[str]:
    """The flags of conftest without those of the latent attack; `extra` are texts of several."""
    found = flags(data, out, *(word for text in extra for word in str(text).split()))
    for name in ("--iterations", "--start_step"):
        place = found.index(name)
        del found[place : place + 2]
    return found


def attacked(data, out, attack, *extra):
    return run([*MAIN, *given(data, out, *extra), "--attack", str(attack)])


def compared(data, out, *extra):
    answer = succeed([*COMPARE, *given(data, out, *extra)])
    return answer


def test_the_librarys_own_result_is_reproduced_to_the_byte(data, quick, tmp_path):
    name = "torchattack:DIFGSM(steps=3,eps=4/255)"
    answer = attacked(data, tmp_path, name, "--budget none --seed 7 --limit 2")
    assert answer.returncode == 0, answer.stderr
    model = load_classifier(quick, 1000, 96, attacked=True)
    for k, label in enumerate((0, 21)):
        clean = to_tensor(read_image(data / "images" / f"img{k}.png", 96))
        torch.manual_seed(7)
        attack = torchattack.DIFGSM(model, None, torch.device("cpu"), eps=4 / 255, steps=3)
        expected = attack(clean, torch.tensor([label])).detach()[0]
        pixels = (255 * expected).round().byte().permute(1, 2, 0).numpy()
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"{k:04d}_adv_image.png")), pixels)


USERS = """
import torch


def attack(images, labels, classifier, eps=0.1, steps=3, targets=None):
    x = images.clone().requires_grad_()
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(classifier(x), labels)
        (gradient,) = torch.autograd.grad(loss if targets is None else -loss, x)
        x = (x + eps / steps * gradient.sign()).detach().requires_grad_()
    return x


def plain(images, labels, classifier):
    return images + 0.3 * torch.randn_like(images)


def sometimes(images, labels, classifier):
    if int(labels) == 332:
        raise KeyError("this one")
    return images + 0.3 * torch.randn_like(images)


def wrong(images, labels, classifier):
    return images[:, :1]
"""


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.py").write_text(USERS)
    return tmp_path / "mine.py"


def test_a_users_function_is_an_attack_that_goes_on_and_is_known_by_its_file(data, mine, tmp_path):
    out = tmp_path / "out"
    command = (data, out, f"{mine}:attack(steps=2)", "--budget psnr=33 --figures all")
    assert attacked(*command).returncode == 0
    results, before = json.loads((out / "results.json").read_text()), pictures(out)
    for row in results["images"]:
        assert 33 <= row["psnr"] < 33.5 and row["attack_runs"] >= 1 and row["radius"] > 0
        assert row["evaluations"]["surrogate"] == 2 * row["attack_runs"] and "UNet" not in row["evaluations"]
    assert results["costs"]["UNet"] == 0 and results["costs"]["peak_memory"] > 1e8
    assert (out / "timestep_analysis" / "0000_contact_sheet.png").exists()
    assert "Where the self-attention loss comes from" not in (out / "report.html").read_text()
    (out / "0002_record.npz").unlink()
    again = attacked(*command)
    assert again.returncode == 0 and "3 of 4 images are done" in again.stderr and pictures(out) == before
    mine.write_text(USERS + "\n\nother = 1\n")
    refused = attacked(*command)
    assert refused.returncode == 2 and "mine.py:attack(steps=2) has changed" in refused.stderr


@pytest.mark.parametrize(
    "function, extra, message",
    [
        ("wrong", "", "a tensor (1, 1, 96, 96) of torch.float32; expected (1, 3, 96, 96)"),
        ("attack(speed=1)", "", "unexpected keyword argument 'speed'"),
        ("plain", "--target_label 3", "is not targeted"),
    ],
)
def test_a_users_function_that_cannot_be_used_is_said_in_one_line(
    data, mine, tmp_path, function, extra, message
):
    answer = attacked(data, tmp_path / "out", f"{mine}:{function}", extra)
    last = answer.stderr.splitlines()[-1]
    assert answer.returncode == 2 and last.startswith("main.py: error") and message in last, answer.stderr
    assert "Traceback" not in answer.stderr


def test_one_image_on_which_an_attack_fails_does_not_end_the_run(data, mine, tmp_path):
    """Without a radius the change of a user's attack is scaled."""
    answer, out = attacked(data, tmp_path / "out", f"{mine}:sometimes"), tmp_path / "out"
    assert answer.returncode == 1 and "fails with KeyError" in answer.stdout
    assert [path.name for path in sorted(out.glob("*_failed.txt"))] == ["0002_failed.txt"]
    assert len(pictures(out)) == 3 * 5
    assert json.loads((out / "results.json").read_text())["mean_psnr"] == pytest.approx(35, abs=0.1)


# which no test above goes through, small
ATTACKS = "PGDL2(steps=1) TIFGSM(steps=1) BSR(num_scale=2,steps=1) SSA(num_spectrum=2,steps=1)"
ATTACKS += " DeCoWA(num_warping=2,steps=1)"


def test_every_attack_of_the_list_goes_from_end_to_end(data, tmp_path):
    names = [f"torchattack:{name}" for name in ATTACKS.split()]
    # SSA is written for 224 pixels
    compared(data, tmp_path, f"--attacks {','.join(names)}", "--budget psnr=35 --res 224 --limit 1")
    results = json.loads((tmp_path / "comparison.json").read_text())
    assert results["modes"] == names and len(pictures(tmp_path / parse_attack(names[0]).folder)) == 5
    (figure,) = [figure for figure in results["figures"] if figure["name"] == "PSNR dB"]
    for name in names:
        assert 35 <= figure["values"][name]["value"] <= 35.5, name
        costs = results["costs"][name]
        assert costs["surrogate"] > 0 and costs["surrogate, backward"] > 0 and costs["UNet"] == 0


def test_what_the_latent_attack_asks_is_counted(whole):
    costs = json.loads((whole("fixed") / "results.json").read_text())["costs"]
    # 3 iterations over 2 timesteps: inversion, the unperturbed run, the iterations, and the last look
    assert costs["UNet"] == 2 * (1 + 1 + 3 + 1) and costs["decoder"] == 1 + 3 + 1
    assert costs["surrogate, backward"] == 3 * 2  # draws of `resize:0.9`


def test_attacks_side_by_side_with_curves_pages_and_published_rows(data, mine, tmp_path):
    names, out = ["torchattack:MIFGSM(steps=3)", f"{mine}:plain"], tmp_path / "out"
    command = f"--attacks {','.join(names)} --budget psnr=33 --published --limit 2"
    command += " --transfer_models efficientnet_lite1"
    answer = compared(data, out, command, "--page --figures pooled")
    results = json.loads((out / "comparison.json").read_text())
    assert results["modes"] == names and len(results["curves_over_parts"][names[1]]) == 7
    (figure,) = [figure for figure in results["figures"] if figure["name"] == "PSNR dB"]
    assert all(33 <= figure["values"][name]["value"] <= 33.5 for name in names)
    assert {tuple(pair["modes"]) for pair in results["at_equal_visibility"]} == {tuple(names)}
    assert {pair["visibility"] for pair in results["at_equal_visibility"]} == {"L2", "SSIM"}
    layout = Layout(out / parse_attack(names[0]).folder, 2)  # a point is of the pictures with that part
    pairs = [read_pair(layout, k) for k in range(2)]
    parts = [np.round(clean + 0.55 * (adversarial.astype(float) - clean)) for clean, adversarial in pairs]
    distances = [np.linalg.norm((part - clean) / 255) for part, (clean, _) in zip(parts, pairs)]
    point = results["curves_over_parts"][names[0]][3]
    assert point["% of the change"] == 55 and point["L2"]["value"] == pytest.approx(np.mean(distances), 1e-4)
    drawn = [f"timestep_analysis/{name}.png" for name in ("tradeoff", "equally_visible")]
    for name in ("comparison.html", "judging.html", *drawn):
        assert (out / name).exists(), name
    assert "no published figures known" in answer.stdout and "runs for the budget" in answer.stdout
    trials = sorted(json.loads((out / "judging_key.json").read_text())["trials"])
    (out / "choices.csv").write_text("trial,choice,seconds\n" + "".join(f"{t},left,1\n" for t in trials))
    compared(data, out, command, f"--judged {out}/choices.csv")
    assert len(json.loads((out / "comparison.json").read_text())["judged"]) == len(trials)


def test_budgets_are_swept(data, tmp_path):
    names = ["torchattack:PGD(steps=2)", "torchattack:MIFGSM(steps=2)"]
    compared(data, tmp_path, f"--attacks {','.join(names)} --limit 1 --sweep budget=psnr=40,34")
    assert json.loads((tmp_path / "sweep.json").read_text())["values"] == [40, 34]
    folder = tmp_path / "budget_psnr_34" / parse_attack(names[1]).folder
    assert json.loads((folder / "run.json").read_text())["budget"] == "psnr=34"
