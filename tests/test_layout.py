"""The folders and who may import whom (CONTRIBUTING.md), read off the files: with imports inside functions,
and those for types alone.
"""

import ast
from graphlib import TopologicalSorter

from conftest import ROOT

PACKAGE = ROOT / "diffattack"
FOLDERS = ("common", "data", "diffusion", "classifiers", "evaluation", "plotting", "attacks")
METHOD = ("attentionControl", "diff_latent_attack")
COMMANDS = ("main", "compare", "benchmark", "utils")
# each imports from its own rank or from those before it
RANKS = [*FOLDERS, "timestep_weights", "options", "losses", METHOD, "runner", COMMANDS]

PRODUCT = sorted([*ROOT.glob("*.py"), *PACKAGE.rglob("*.py")])
ALL = [*PRODUCT, *sorted(ROOT.glob("tests/*.py")), *sorted(ROOT.glob("demo/*.py"))]


def name_of(path) -> str:
    """As it is imported: "diffattack.data.images", or "main"."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


MODULES = {name_of(path): path for path in PRODUCT if path.name != "__init__.py"}


def rank_of(module: str) -> int:
    first = module.removeprefix("diffattack.").split(".")[0]
    return next(k for k, rank in enumerate(RANKS) if first == rank or (type(rank) is tuple and first in rank))


def imports_of(path) -> set[str]:
    """Modules of this project."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & set(MODULES)


def test_a_module_imports_from_its_own_rank_or_from_below():
    for module, path in MODULES.items():
        imported = imports_of(path)
        assert not [other for other in imported if rank_of(other) > rank_of(module)], module
        assert not imported & set(COMMANDS), f"{module} imports a command"


def test_there_is_no_circle():
    order = list(TopologicalSorter({m: imports_of(path) for m, path in MODULES.items()}).static_order())
    assert set(order) == set(MODULES)


def test_the_top_is_the_commands_and_the_method():
    top = {path.stem for path in ROOT.glob("*.py")}
    assert top == {*METHOD, "timestep_weights", *COMMANDS}
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == {*FOLDERS, "runner"}
    for folder in folders:  # `common.environment` must come before torch, which an import here could bring
        assert (PACKAGE / folder / "__init__.py").read_text() == ""


def test_a_command_prepares_for_its_imports_first():
    """So that Ctrl-C ends it at once from there on (test_runs.py), and libraries find what they read."""
    for command in COMMANDS:
        nodes = ast.parse((ROOT / f"{command}.py").read_text()).body
        imports = [ast.unparse(node) for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
        first = next(line for line in imports if "__future__" not in line)
        assert first == "import diffattack.common.environment", command


def test_what_has_to_be_read_at_once_is_short():
    for path in ALL:
        lines = path.read_text().splitlines()
        assert not [k for k, line in enumerate(lines, 1) if len(line) > 110], path
        if path in PRODUCT:
            assert len(lines) <= 450, path
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef):
                    assert node.end_lineno - node.lineno < 75, node.name
