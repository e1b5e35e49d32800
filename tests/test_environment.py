"""One environment, said in several files: they agree, and what is imported is locked."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

PYTHON = "3.11"

CORE = {
    "torch": "2.13.0", "transformers": "5.17.0", "trl": "1.14.2", "peft": "0.21.2", "datasets": "4.8.5",
    "accelerate": "1.15.0", "gguf": "0.19.0", "openai": "3.54.0", "snakemake": "9.27.1", "papermill": "2.7.0",
    "pandas": "3.1.1", "pyarrow": "26.0.1", "pydantic": "2.14.3", "pandera": "0.35.0", "scipy": "1.17.1",
    "statsmodels": "0.15.0", "scikit-learn": "1.9.1", "jupyterlab": "4.6.6", "itables": "2.9.1",
}  # fmt: skip
"""Versions that were measured to work together; with any other, results and tests are to be looked at again."""

JOINT = {"unsloth": "2026.10.7", "vllm": "0.32.0", "torchvision": "0.28.0"}
"""The set for CUDA has these besides."""

DIFFERENT = {
    "numpy": "vLLM, through mistral-common, wants numpy < 2.4 on Python 3.11",
    "lark": "vLLM, through its grammars, wants lark 1.2.2",
}
"""Packages whose versions differ between the locks, and why."""

CPU_ONLY = {"jupytext", "mdit-py-plugins"}
"""For writing notebooks by hand; nothing of ours imports them."""

OPTIONAL = {"unsloth", "vllm"}
"""Imported only where they are installed: they need a GPU (vLLM's CPU build is for its tests)."""

COMES_WITH_PYTHON = {"setuptools", "pip"}

ENVIRONMENT_S = 600


def pins(path: Path) -> dict[str, str]:
    """Package -> version of a lock; every line is a comment or a pin, and no package stands twice."""
    found: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        name, _, version = line.partition("==")
        assert re.fullmatch(r"[\w.-]+==[\w.!+]+", line), f"{path.name}: not a pin: {line!r}"
        assert canonicalize_name(name) not in found, f"{path.name}: {name} stands twice"
        found[canonicalize_name(name)] = str(Version(version))
    return found


@pytest.fixture(scope="module")
def cpu(root):
    return pins(root / "requirements" / "cpu.lock")


@pytest.fixture(scope="module")
def cuda(root):
    return pins(root / "requirements" / "cuda.lock")


@pytest.fixture(scope="module")
def no_deps(root):
    return pins(root / "requirements" / "no-deps.lock")


def test_one_python_everywhere(root):
    environment = yaml.safe_load((root / "environment.yml").read_text(encoding="utf-8"))
    named = [d for d in environment["dependencies"] if isinstance(d, str) and d.startswith("python=")]
    assert named == [f"python={PYTHON}"]
    project = re.search(r'requires-python = "(.*)"', (root / "pyproject.toml").read_text(encoding="utf-8"))[1]
    assert SpecifierSet(project).contains(f"{PYTHON}.0")
    target = re.search(r'target-version = "py(\d)(\d+)"', (root / "pyproject.toml").read_text(encoding="utf-8"))
    assert ".".join(target.groups()) == PYTHON
    assert PYTHON in (root / "run_all.sh").read_text(encoding="utf-8")


def test_conda_installs_the_lock_and_nothing_beside_it(root):
    environment = yaml.safe_load((root / "environment.yml").read_text(encoding="utf-8"))
    assert environment["name"] == "cai-em"
    assert {d for d in environment["dependencies"] if isinstance(d, str)} == {f"python={PYTHON}", "pip"}
    (pip,) = [d["pip"] for d in environment["dependencies"] if isinstance(d, dict)]
    assert [line for line in pip if not line.startswith("--")] == ["-r requirements/cpu.lock"]


def test_the_project_itself_asks_for_nothing(root):
    """So that installing it can change no pin."""
    assert "\ndependencies" not in (root / "pyproject.toml").read_text(encoding="utf-8")


def test_the_measured_versions_are_in_both_locks(cpu, cuda):
    for lock in (cpu, cuda):
        assert {name: lock.get(name) for name in CORE} == CORE
    assert {name: cuda.get(name) for name in JOINT} == JOINT


def test_the_locks_differ_only_where_they_must(cpu, cuda):
    assert {name for name in cpu.keys() & cuda.keys() if cpu[name] != cuda[name]} == set(DIFFERENT)
    assert cpu.keys() - cuda.keys() == CPU_ONLY


def test_what_is_installed_without_its_dependencies_has_a_reason(root, cpu, cuda, no_deps):
    lines = (root / "requirements" / "no-deps.lock").read_text(encoding="utf-8").splitlines()
    for before, line in zip(["", *lines], lines):
        assert line.startswith("#") or before.startswith("#"), f"no reason stands above {line}"
    assert not no_deps.keys() & (cpu.keys() | cuda.keys())


def test_run_all_installs_every_lock(root):
    text = (root / "run_all.sh").read_text(encoding="utf-8")
    for name in ("cpu.lock", "cuda.lock", "no-deps.lock"):
        assert f"requirements/{name}" in text


def imported(root: Path) -> dict[str, str]:
    """Top-level module -> a file that imports it, over library, tests, benchmarks, notebooks and Snakefile."""
    found: dict[str, str] = {}
    sources = {
        p: p.read_text(encoding="utf-8") for d in ("lib", "tests", "benchmarks") for p in (root / d).rglob("*.py")
    }
    sources[root / "Snakefile"] = "".join(
        line + "\n"
        for line in (root / "Snakefile").read_text(encoding="utf-8").splitlines()
        if line.startswith(("import ", "from "))
    )
    for path in (root / "notebooks").glob("*.ipynb"):
        cells = [c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
        sources[path] = "\n".join(
            line for c in cells for line in c.splitlines() if not line.lstrip().startswith(("%", "!"))
        )
    for path, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names = [node.module]
            found |= {name.partition(".")[0]: path.name for name in names}
    ours = {p.stem for d in ("tests", "benchmarks") for p in (root / d).glob("*.py")} | {"cai_em", "tests"}
    return {name: path for name, path in found.items() if name not in sys.stdlib_module_names and name not in ours}


def test_everything_imported_is_locked(root, cpu, cuda):
    modules = imported(root)
    assert {"torch", "pandas", "aiohttp"} <= modules.keys(), "the scan finds imports"
    packages = importlib.metadata.packages_distributions()
    for module, path in modules.items():
        if module in OPTIONAL:
            assert canonicalize_name(module) in cuda
            continue
        names = {canonicalize_name(name) for name in packages.get(module, [])}
        assert names & cpu.keys(), f"{path} imports {module}, which no package of cpu.lock provides"
        assert names & cuda.keys(), f"{path} imports {module}, which no package of cuda.lock provides"


def _installed() -> dict[str, importlib.metadata.Distribution]:
    return {canonicalize_name(d.metadata["Name"]): d for d in importlib.metadata.distributions()}


@pytest.fixture
def environment(cpu):
    """The packages installed here, where this is an environment made from cpu.lock."""
    found = _installed()
    if Version(found["torch"].version).local not in (None, "cpu") or "vllm" in found:
        pytest.skip("this environment was not made from cpu.lock")
    return found


def test_what_is_installed_is_what_is_locked(environment, cpu, no_deps):
    wanted = {**cpu, **no_deps}
    found = {name: Version(environment[name].version).public if name in environment else None for name in wanted}
    assert found == wanted


def test_the_cpu_lock_is_complete_and_without_contradictions(environment, cpu):
    """What each locked package asks for is locked, at a version that will do."""
    troubles = []
    for name in cpu:
        for line in environment[name].requires or []:
            need = Requirement(line)
            if need.marker and not need.marker.evaluate({"extra": ""}):
                continue
            pinned = cpu.get(canonicalize_name(need.name))
            if canonicalize_name(need.name) in COMES_WITH_PYTHON:
                continue
            if pinned is None or not need.specifier.contains(pinned, prereleases=True):
                troubles.append(f"{name} wants {need}, locked is {pinned}")
    assert not troubles


@pytest.fixture(scope="module")
def uv(tmp_path_factory):
    """The resolver: it reads packages' metadata and downloads none of them. Installed aside where it is not at hand."""
    if found := shutil.which("uv"):
        return found
    target = tmp_path_factory.mktemp("uv")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--target", target, "uv"], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"uv cannot be installed (offline?): {done.stderr.strip()[-200:]}")
    return str(target / "bin" / "uv")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cpu.lock", "cuda.lock"])
def test_the_lock_resolves_by_metadata_and_is_complete(root, uv, name):
    """On Debian 12's Python 3.11.2. (To the CPU lock, torch from PyPI would add the libraries of CUDA.)"""
    command = [uv, "pip", "compile", "-q", "--no-config", "--no-header", "--no-annotate", root / "requirements" / name]
    command += ["--python-version", "3.11.2", "--python-platform", "x86_64-manylinux_2_28"]
    keep = {key: value for key, value in os.environ.items() if not key.startswith("UV_")}
    # uv reads no pip settings: of these, the certificates of a proxy are needed.
    if bundle := os.environ.get("PIP_CERT"):
        keep.setdefault("SSL_CERT_FILE", bundle)
    done = subprocess.run(command, capture_output=True, text=True, timeout=ENVIRONMENT_S, env=keep)
    if done.returncode and "No solution found" not in done.stderr:
        pytest.skip(f"uv could not reach the package index: {done.stderr.strip()[-300:]}")
    assert done.returncode == 0, done.stderr
    needed = {canonicalize_name(line.partition("==")[0].strip()) for line in done.stdout.splitlines() if "==" in line}
    missing = needed - pins(root / "requirements" / name).keys() - COMES_WITH_PYTHON
    if name == "cpu.lock":
        missing = {m for m in missing if not m.startswith(("nvidia-", "cuda-")) and m != "triton"}
    assert not missing
