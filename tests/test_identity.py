"""A classifier is what it computes: its weights and its answers, whatever files they come from."""

import json

import pytest
import torch
from conftest import IMAGES, MAIN, QUICK, flags, network, refusal, succeed

from diffattack.classifiers.checks import TOLERANCE, difference
from diffattack.classifiers.heads import Head
from diffattack.classifiers.registry import load_classifier
from diffattack.evaluation.judges import Judges

CODE = """import torch
from pathlib import Path


def make():
    net = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(8), torch.nn.Flatten(), torch.nn.Linear(192, {}))
    net.load_state_dict(torch.load(Path(__file__).parent / "w.pt", weights_only=True))
    return net
"""


def write_code(folder, classes: int = 10, seed: int = 0) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "clf.py").write_text(CODE.format(classes))
    write_weights(folder, classes, seed)
    return f"{folder}/clf.py:make"


def write_weights(folder, classes: int, seed: int) -> None:
    net = network(classes)
    if seed:
        with torch.no_grad():
            random = torch.Generator().manual_seed(seed)
            net[2].weight += 0.01 * torch.randn(net[2].weight.shape, generator=random)
    torch.save(net.state_dict(), folder / "w.pt")


def identity(name) -> dict:
    return load_classifier(str(name), 10, 96).identity


def rewrite(path, before: str, after: str) -> None:
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))


def test_weights_behind_unchanged_code_and_a_comment(tmp_path):
    name = write_code(tmp_path)
    first = json.loads(json.dumps(identity(name)))
    rewrite(tmp_path / "clf.py", "def make", "# a comment\ndef make")
    assert difference(first, identity(name)) is None
    write_weights(tmp_path, 10, seed=1)
    assert difference(first, identity(name)) == "its weights are others"
    write_weights(tmp_path, 10, seed=0)
    assert difference(first, identity(name)) is None
    rewrite(tmp_path / "clf.py", "return net", "return torch.nn.Sequential(net, torch.nn.Tanh())")
    assert "answers otherwise with the same weights" in difference(first, identity(name))


@pytest.mark.parametrize("kind", ["pt2", "ts"])
def test_programs(tmp_path, kind):
    """A weight that the answer does not show counts, too."""
    path, net = tmp_path / f"net.{kind}", network(10)

    def saved():
        if kind == "ts":
            torch.jit.script(net.eval()).save(path)
        else:
            shapes = ({0: torch.export.Dim("b")},)
            torch.export.save(torch.export.export(net, (IMAGES[:2],), dynamic_shapes=shapes), path)
        return identity(path)

    first = saved()
    assert difference(first, saved()) is None  # other bytes, such as times
    with torch.no_grad():
        net[2].weight[0, 0] += 1e-6
    changed = saved()
    assert difference(first, changed) == "its weights are others"
    assert difference(first | {"weights": ""}, changed | {"weights": ""}) is None


def test_numbers_are_compared_and_not_their_digits():
    known = load_classifier("efficientnet_lite0", 1000, 96).identity
    assert known["weights"] == "" and len(json.dumps(known)) < 300
    for factor, same in ((1 + TOLERANCE / 2, True), (1 + 2 * TOLERANCE, False)):
        other = known | {"answer": [factor * number for number in known["answer"]]}
        assert (difference(known, other) is None) == same
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    try:
        assert difference(known, load_classifier("efficientnet_lite0", 1000, 96).identity) is None
    finally:
        torch.set_num_threads(threads)
    assert "not known" in difference(None, known)


def test_what_another_classifier_of_the_same_name_found_is_not_taken():
    one, other = ({"weights": w, "answer": [1.0] * 8} for w in "ab")
    nearly = one | {"answer": [1 + TOLERANCE / 2] * 8}  # on another machine

    def judges(s: dict, t: dict, **more) -> Judges:
        network, names = "n", ("t", "t@jpeg:75")
        known = {"s": s, "t": t}
        return Judges(("s",), names, ("a", "b"), torch.device("cpu"), network, None, known, **more)

    kept = json.dumps(judges(one, one).description)
    assert judges(one, one).are(kept) and judges(nearly, nearly).are(kept)
    assert not judges(one, other).are(kept) and not judges(other, one).are(kept)
    assert not judges(one, one, draws=2).are(kept) and not judges(one, one, head=Head(0.5)).are(kept)
    assert not judges(one, one, measures=["LPIPS"]).are(kept)


def test_a_run_goes_on_with_the_same_classifier_alone(data, tmp_path):
    """The surrogate's weights are replaced: refused, by name. A judge's are: it judges anew."""
    surrogate, judge = (write_code(tmp_path / name, 1000) for name in ("surrogate", "judge"))
    out = tmp_path / "out"

    def attack(limit):
        given = f"--model_name {surrogate} --transfer_models {judge} --processes 1 --limit {limit}"
        return [*MAIN, *flags(data, out, *given.split())]

    def judged():
        rows = json.loads((out / "results.json").read_text())["images"]
        return [row["predictions"][judge]["after"]["true_confidence"] for row in rows]

    succeed(attack(1))
    rewrite(tmp_path / "surrogate/clf.py", "def make", "# a comment\ndef make")
    succeed(attack(2))
    before = judged()
    succeed(attack(2))
    assert judged() == before

    write_weights(tmp_path / "judge", 1000, seed=1)
    succeed(attack(2))
    assert all(old != new for old, new in zip(before, judged()))

    write_weights(tmp_path / "surrogate", 1000, seed=1)
    for limit in (2, 4):
        message = f"the classifier {surrogate} has changed (its weights are others)"
        assert message in refusal(attack(limit))
    assert len(list(out.glob("*_record.npz"))) == 2


def test_weights_that_are_drawn_anew_each_time_are_refused(data, tmp_path):
    """Each process, and each defence, would have another classifier."""
    path = tmp_path / "mine.py"
    unseeded = QUICK.replace("    torch.manual_seed(0)\n", "")
    path.write_text(
        f"import numpy\n{unseeded}\n\ndef drawn():\n    net = build()\n    with torch.no_grad():\n"
        "        net[2].bias += torch.from_numpy(numpy.random.rand(1000))\n    return net\n"
    )
    first, second = (load_classifier(f"{path}:build", 1000, 96).identity for _ in range(2))
    assert first == second  # torch draws the same each time
    given = f"--model_name {path}:drawn --transfer_models {path}:drawn@jpeg:75 --processes 1 --limit 1"
    refused = refusal([*MAIN, *flags(data, tmp_path / "out", *given.split())])
    assert "has changed since this run began (its weights are others); it must be the same" in refused
    assert not (tmp_path / "out").exists()
