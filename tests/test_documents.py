"""README, the manual in docs/ and the notebook: flags that are named exist, links lead somewhere, and what
they show runs.
"""

import dataclasses
import functools
import json
import os
import re
import shlex
import sys
from pathlib import Path

import matplotlib
import pytest
from conftest import ROOT, run, succeed

from diffattack.common.flags import flag_table
from diffattack.options import Options
from diffattack.runner.compare import CompareOptions

PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "demo" / "README.md", *ROOT.glob("docs/*.md")]
)
MANUAL = [page for page in PAGES if page.parent.name == "docs" or page == ROOT / "README.md"]
OF_OTHERS = {  # of Slurm, accelerate, pip and pytest
    *("array", "gpus", "gpus-per-node", "nodes", "ntasks-per-node", "requeue"),
    *("num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port"),
    *("no-deps", "target", "check", "dist"),
}
PROGRAMS = ("main.py", "compare.py", "utils.py", "benchmark.py", "docs/gpu.py")
PROGRAMS += ("demo/train_tiny_diffusion.py", "demo/evaluate_tiny_diffusion.py")
SMALL = ["--res", "96", "--limit", "1", "--iterations", "2", "--draws", "1", "--figures", "none"]


@functools.cache
def flags_of(program: str) -> set[str]:
    """The flags that a program of the checkout takes."""
    kinds = {"main.py": Options, "compare.py": CompareOptions}
    if program in kinds:
        return {"help"} | {declared.name for declared in dataclasses.fields(kinds[program])}
    return set(re.findall(r'add(?:_argument)?\(\s*"--(\w+)"', (ROOT / program).read_text()))


def commands_of(page: Path) -> list[str]:
    """The lines of its blocks of code that call Python, pip or accelerate, with continued ones joined."""
    blocks = re.findall(r"^(?: {4}.*\n|\n)+", page.read_text(), re.M)
    lines = re.sub(r"\\\n\s*", " ", "".join(blocks)).splitlines()
    starts = re.compile(r"(?:srun bash -c ')?(?:\.venv/bin/)?(?:python3?|pip|accelerate) ")
    return [line.strip() for line in lines if starts.match(line.strip())]


COMMANDS = [(page.relative_to(ROOT), command) for page in PAGES for command in commands_of(page)]


def test_a_page_is_read_at_once():
    assert len(COMMANDS) > 40
    for page in MANUAL:
        assert len(page.read_text().splitlines()) <= 150, page


def test_every_flag_of_a_command_is_one_of_its_program():
    for page, command in COMMANDS:
        for part in command.split("&&"):
            program = re.search(r"([\w/]+\.py)\b(?!:)(.*)", part)
            if program is None or program[1] == "FILE.py":
                continue
            assert (ROOT / program[1]).is_file(), f"{page}: {program[1]}"
            unknown = set(re.findall(r"(?<!\S)--(\w+)", program[2])) - flags_of(program[1])
            assert not unknown, f"{page}: {unknown} in {command}"


def test_every_flag_and_file_that_is_named_exists():
    flags = OF_OTHERS.union(*map(flags_of, PROGRAMS))
    for page in PAGES:
        text = page.read_text()
        named = set(re.findall(r"(?<![\w-])--([a-z]\w*(?:-\w+)*)", text))
        assert named <= flags, f"{page}: {named - flags}"
        for place in re.findall(r"\]\(([^)\s]+)\)", text):
            if "://" not in place:
                check_link(page, place)
    for path in (*ROOT.glob("*.py"), *ROOT.glob("diffattack/**/*.py"), *ROOT.glob("docs/*.py")):
        for name in re.findall(r"docs/\w+\.\w+", path.read_text()):
            assert (ROOT / name).is_file(), f"{path}: {name}"


def check_link(page: Path, place: str) -> None:
    """Of a file, and of a heading in it."""
    name, _, anchor = place.partition("#")
    target = (page.parent / name).resolve() if name else page
    assert target.exists(), f"{page}: {place}"
    if anchor:
        headings = re.findall(r"^#+ (.+)$", target.read_text(), re.M)
        anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert anchor in anchors, f"{page}: {place}"


def test_the_docs_list_every_flag():
    text, table = (ROOT / "docs" / "flags.md").read_text(), flag_table(Options)
    listed = re.findall(r"^\| `--(\w+)`", table, re.M)
    assert sorted(listed) == sorted(declared.name for declared in dataclasses.fields(Options))
    assert table in text, "paste what `python -m diffattack.options` prints"
    assert all(line in text for line in flag_table(CompareOptions).splitlines())


def test_the_table_of_timestep_weighting_is_that_of_its_images():
    lines = succeed([sys.executable, "docs/modes_table.py"]).stdout.splitlines()
    rows = [line for line in lines if line.startswith("| ") and "---" not in line]
    assert len(rows) > 5 and set(rows) <= set((ROOT / "docs" / "results.md").read_text().splitlines())


# ---------------------------------------------------------------- what they say is run


@pytest.fixture(scope="module")
def attacked(tmp_path_factory) -> Path:
    """The run that README and the pages begin with."""
    out = tmp_path_factory.mktemp("documents") / "output_fixed"
    result = run_small(out, "README.md", "python main.py --images_root demo/images", *SMALL)
    assert "bison" in result.stdout
    return out


def run_small(out: Path, page: str, beginning: str, *more: str, **replaced: str):
    """The page's first command that begins so, on one small picture, into another folder."""
    command = next(line for line in commands_of(ROOT / page) if line.startswith(beginning))
    for old, new in replaced.items():
        command = command.replace(old, new)
    result = run([sys.executable, *shlex.split(command)[1:], "--save_dir", str(out), *more])
    assert result.returncode == 0, result.stderr
    return result


@pytest.mark.slow
@pytest.mark.parametrize(
    "page, beginning, written",
    [
        ("weights", "--modes uniform,fixed,minimax --structure_share 1", "comparison.tex"),
        ("judge", "--limit 2 --attacks diffattack,torchattack:PGD", "judging.html"),
    ],
)
def test_a_command_of_the_manual_runs(tmp_path, page, beginning, written):
    result = run_small(tmp_path, f"docs/{page}.md", f"python compare.py {beginning}", *SMALL)
    assert "bison" in result.stdout or "white-box" in result.stdout
    assert (tmp_path / written).exists()


@pytest.mark.slow
def test_an_attack_of_ones_own_runs_as_the_manual_says(tmp_path):
    beginning, small = "python main.py --attack docs/pixel_attack.py:momentum", [*SMALL[:4], *SMALL[-2:]]
    run_small(tmp_path, "docs/library.md", beginning, *small, momentum="'momentum(iterations=2,draws=1)'")
    assert json.loads((tmp_path / "results.json").read_text())["mean_psnr"] == pytest.approx(35, abs=0.1)


@pytest.mark.slow
def test_a_folder_is_judged_as_the_manual_says(attacked, tmp_path):
    beginning, folder = (
        "python main.py --is_test --images_root output_fixed/",
        {"output_fixed/": f"{attacked}/"},
    )
    result = run_small(tmp_path, "docs/judge.md", beginning, "--judge_draws", "2", **folder)
    assert "worst of 2 draws" in result.stdout and (tmp_path / "evaluation.csv").is_file()
    # results have the keys that the manual lists
    results = json.loads((attacked / "results.json").read_text())
    section = (ROOT / "docs" / "judge.md").read_text().split("## results.json, key by key")[1]
    rows = re.findall(r"^\| (`.+?) \|", section, re.M)
    listed = {name for row in rows for name in re.findall(r"`(\w+)", row)}
    missing = {key for key in results if not key.startswith("transfer_")} - listed
    assert not missing and listed - {"transfer_"} <= set(results)


@pytest.mark.nightly
@pytest.mark.parametrize("script", ["timestep_gradients", "structure_objective"])
def test_a_measurement_of_the_docs_runs(tmp_path, script):
    out = ["--save_dir", str(tmp_path)] if script == "structure_objective" else []
    result = succeed([sys.executable, f"docs/{script}.py", "--limit", "1", *out], anew=True)
    assert "1 photographs" in result.stdout


@pytest.mark.slow
def test_the_notebook_runs(monkeypatch):
    """Its cells in their order: each schedule is in force, both pictures fool the classifier, keep to the
    budget, and differ.
    """
    matplotlib.use("Agg")
    monkeypatch.chdir(ROOT / "demo")
    path, space = ROOT / "demo" / "schedules.ipynb", {}
    cells = json.loads(path.read_text())["cells"]
    assert os.path.getsize(path) < 300_000 and len(cells) == 10
    for cell in ("".join(each["source"]) for each in cells if each["cell_type"] == "code"):
        smaller = cell.replace("LABEL = 224", "LABEL = 96").replace("share=1.0", "share=1.0, draws=2")
        exec(smaller, space)
    matplotlib.pyplot.close("all")
    clean, results = space["clean"], space["results"]
    assert clean.shape == (1, 3, 96, 96)
    for name, result in results.items():
        weights = result.record.weights
        assert weights.sum(1).tolist() == pytest.approx([1] * len(weights))
        assert weights[-1].tolist() == pytest.approx(space["named_schedules"](5)[name])
        assert space["psnr"](result.adversarial, clean) >= 35
        assert space["classifier"](result.adversarial).argmax(1) != space["label"]
    assert 36 < space["psnr"](*(result.adversarial for result in results.values())) < 60


@pytest.mark.slow
def test_the_script_of_the_library_page_runs(monkeypatch, capsys):
    page = (ROOT / "docs" / "library.md").read_text()
    script = re.search(r"(?:^ {4}.*\n|^\n)+", page[page.index("    from pathlib") :], re.M)[0]
    monkeypatch.chdir(ROOT)
    source = re.sub(r"^ {4}", "", script, flags=re.M).replace("224", "96")
    space = {}
    exec(source.replace('weight_mode="fixed"', 'weight_mode="fixed", iterations=2, draws=1'), space)
    assert space["result"].adversarial.shape == (2, 3, 96, 96)
    assert len(repr(space["result"])) < 200  # no picture is printed
    assert "tensor(" in capsys.readouterr().out
    named = set(re.findall(r"`record\.(\w+)`|, `\.(\w+)`", page))
    for name in {one or other for one, other in named}:
        assert hasattr(space["result"].record, name), name
