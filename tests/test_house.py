"""The house: floors and doors, as contracts; types; names that stand in one place."""

import ast
import importlib
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

PACKAGES = (
    "records", "study", "analysis", "endpoint", "model", "sample", "judge", "train", "dynamics", "workflow", "report",
    "audit",
)  # fmt: skip


def run(name, *arguments, cwd):
    """A command of this environment: its exit status and what it said."""
    command = [Path(sys.executable).with_name(name), *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_no_package_imports_from_a_floor_above_and_nothing_goes_in_circles(root):
    status, said = run("lint-imports", "--no-cache", "--no-logo", cwd=root)
    assert status == 0, said[-3000:]


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_has_a_door_that_says_what_the_room_is_for_and_opens(name):
    package = importlib.import_module(f"cai_em.{name}")
    assert 3 <= len(package.__doc__.strip().splitlines()) <= 6
    assert sorted(package.__all__) == list(package.__all__)
    for what in package.__all__:
        assert getattr(package, what) is not None


def test_every_package_is_a_floor_of_the_contract(root):
    found = {p.parent.name for p in (root / "lib" / "cai_em").glob("*/__init__.py")}
    contract = (root / "pyproject.toml").read_text()
    assert found == {name for name in found if f"cai_em.{name}" in contract}


def test_notebooks_import_packages_and_not_their_rooms(root):
    import nbformat

    for path in sorted((root / "notebooks").glob("*.ipynb")):
        for cell in nbformat.read(path, 4).cells:
            for line in cell.source.splitlines() if cell.cell_type == "code" else ():
                if line.startswith(("import cai_em", "from cai_em")):
                    assert line.split()[1].count(".") <= 1, f"{path.name}: {line}"


def test_a_job_starts_without_walking_all_that_it_imports():
    """Python's collector would walk torch's and transformers' objects again and again, a sixth of a job's start."""
    code = "import gc; from cai_em import model, sample; model.load_model, sample.open_engine; print(gc.get_stats())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    young, _, full = (generation["collections"] for generation in ast.literal_eval(done.stdout))
    assert young > 100  # what dies young is collected as ever
    assert full <= 1


def test_a_public_name_is_defined_in_one_module(root):
    """But `main` of the command lines, and figures: a figure's name is its key, often that of the table it draws."""
    homes = defaultdict(list)
    for path in sorted((root / "lib").rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                if not any(ast.unparse(d).startswith("figure(") for d in node.decorator_list):
                    homes[node.name].append(path)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    if isinstance(target, ast.Name):
                        homes[target.id].append(path)
    twice = {
        name: [str(p.relative_to(root)) for p in paths]
        for name, paths in homes.items()
        if len(paths) > 1 and not name.startswith("_") and name != "main"
    }
    assert not twice


def test_the_types_hold(root, tmp_path):
    status, said = run("mypy", "--cache-dir", str(tmp_path), cwd=root)
    assert status == 0, said[-3000:]
