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
    shutil.copytree(ROOT / "diffattack", tmp_path / "installed/diffattack")
    for name in METHOD:
        shutil.copy(ROOT / f"{name}.py", tmp_path / "installed")
    for name in ("utils.py", "data/__init__.py", "common/__init__.py"):
        (tmp_path / "project" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "project" / name).write_text("MINE = 1\n")
    return tmp_path / "project"


def python(project, code: str) -> subprocess.CompletedProcess:
    options = dict(env={**ENVIRONMENT, "PYTHONPATH": str(project.parent / "installed")}, cwd=project)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **options)


CODE = """import sys, data, common, utils, diffattack
assert 'torch' not in sys.modules and utils.MINE == data.MINE == common.MINE == 1
assert 'DiffAttack' in dir(diffattack)
from diffattack import ATTACK_PRESETS, DiffAttack, load_pipeline, parse_budget
import diff_latent_attack
assert diff_latent_attack.DiffAttack is DiffAttack and parse_budget('psnr=30')
assert utils.MINE == data.MINE == common.MINE == 1
print(diff_latent_attack.__file__)"""


def test_it_is_imported_beside_modules_of_the_same_names(project):
    result = python(project, CODE)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(project.parent / "installed" / "diff_latent_attack.py")


@pytest.mark.parametrize("name, package", zip(METHOD, ("diffattack", "diff_latent_attack")))
def test_modules_of_the_original_are_not_mixed_with_ours(project, name, package):
    """The original's repository has both of these files."""
    (project / f"{name}.py").write_text("")
    last = python(project, f"from {package} import DiffAttack").stderr.splitlines()[-1]
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
