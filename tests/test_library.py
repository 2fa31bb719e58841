"""The package as others use it: from a project that has folders and files of the same names as ours."""

import shutil
import subprocess
import sys

import pytest
from conftest import ENVIRONMENT, ROOT

from diffattack import METHOD


@pytest.fixture
def project(tmp_path):
    """A folder with modules of its own; the package is installed elsewhere."""
    installed = tmp_path / "installed"
    shutil.copytree(ROOT / "diffattack", installed / "diffattack", ignore=lambda *_: ["__pycache__"])
    for name in METHOD:
        shutil.copy(ROOT / f"{name}.py", installed)
    for name in ("utils.py", "data/__init__.py", "common/__init__.py"):
        (tmp_path / "project" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "project" / name).write_text("MINE = 1\n")
    return tmp_path / "project"


def python(project, code: str) -> subprocess.CompletedProcess:
    environment = {**ENVIRONMENT, "PYTHONPATH": str(project.parent / "installed")}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=project, env=environment, capture_output=True, text=True
    )


def test_it_is_imported_beside_modules_of_the_same_names(project):
    code = (
        "import sys, data, common, utils, diffattack\n"
        "assert 'torch' not in sys.modules and utils.MINE == data.MINE == common.MINE == 1\n"
        "assert 'DiffAttack' in dir(diffattack)\n"
        "from diffattack import ATTACK_PRESETS, DiffAttack, load_pipeline, parse_budget\n"
        "import diff_latent_attack\n"
        "assert diff_latent_attack.DiffAttack is DiffAttack and parse_budget('psnr=30')\n"
        "assert utils.MINE == data.MINE == common.MINE == 1\n"
        "print(diff_latent_attack.__file__)"
    )
    result = python(project, code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(project.parent / "installed" / "diff_latent_attack.py")


@pytest.mark.parametrize("name", METHOD[:2])
@pytest.mark.parametrize(
    "import_", ["from diffattack import DiffAttack", "from diff_latent_attack import DiffAttack"]
)
def test_modules_of_the_original_are_not_mixed_with_ours(project, name, import_):
    """The original's repository has both of these files."""
    (project / f"{name}.py").write_text("")
    last = python(project, import_).stderr.splitlines()[-1]
    assert last.startswith("ImportError") and str(project / f"{name}.py") in last


@pytest.mark.nightly
def test_pip_installs_it(tmp_path):
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", tmp_path / "site"]
    source = tmp_path / "source"  # a build leaves files beside what it builds
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "output*", "build", "*.egg-info"))
    assert subprocess.run([*command, source]).returncode == 0
    installed = {path.name for path in (tmp_path / "site").iterdir() if "dist-info" not in path.name}
    assert installed - {"__pycache__"} == {"diffattack", *(f"{name}.py" for name in METHOD)}
    for path in (ROOT / "diffattack").rglob("*.*"):
        if path.suffix != ".pyc":
            assert (tmp_path / "site" / path.relative_to(ROOT)).is_file(), path
