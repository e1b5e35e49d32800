"""One environment, said in several files: they agree, and what is imported is locked."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
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

OPTIONAL = {"unsloth": "cuda.lock", "vllm": "cuda.lock", "inspect_ai": "inspect.lock"}
"""Imported only where they are installed, and the lock that has them: they need a GPU, or a log of Inspect's."""

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
    for name in ("cpu.lock", "cuda.lock", "no-deps.lock", "quarto.lock"):
        assert f"requirements/{name}" in text


# --- Two commands on a fresh machine: run_all.sh itself, in a clean folder, with stand-ins for the packages ----------

PROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""

BACKEND = """
import pathlib, zipfile

def build_editable(folder, config_settings=None, metadata_directory=None):
    name = "cai_em-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(pathlib.Path(folder) / name, "w") as wheel:
        wheel.writestr("cai_em.pth", str(pathlib.Path.cwd() / "lib"))
        info = "cai_em-0.1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\\nName: cai-em\\nVersion: 0.1.0\\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(f"{info}/RECORD", "")
    return name
"""

CHECK = "import sys; sys.exit('as planned')"
"""What run_all.sh runs first in the new environment."""

GPU_MACHINE = "#!/bin/sh\necho 'GPU 0: pretended'\n"


def wheel(folder: Path, name: str, version: str, source: str = "") -> None:
    """A package of one module, as a file that pip installs."""
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}.py", source)
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")


class Fresh:
    """A clone on a machine of its own: run_all.sh, two locks of two packages, pip without an index."""

    def __init__(self, root: Path, place: Path) -> None:
        self.place, self.wheels = place / "clone", place / "wheels"
        files = {
            "requirements/cpu.lock": "torch==2.13.0\nipykernel==7.4.0\n",
            "requirements/cuda.lock": "torch==2.13.0\nipykernel==7.4.0\nvllm==0.32.0\n",
            "requirements/no-deps.lock": "# None.\n",
            "requirements/quarto.lock": "quarto-cli==1.8.27\n",
            "pyproject.toml": PROJECT,
            "backend.py": BACKEND,
            "lib/cai_em/workflow/check.py": CHECK,
            "lib/cai_em/workflow/__init__.py": "",
            "lib/cai_em/__init__.py": "",
            "params/profiles/demo.yaml": "gpu: false\n",
            "params/profiles/paper.yaml": "gpu: true\n",
            "params/snakemake/local/config.yaml": "",
            "params/snakemake/slurm/config.yaml": "",
        }
        for name, text in files.items():
            path = self.place / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        shutil.copy2(root / "run_all.sh", self.place)
        self.wheels.mkdir()
        said = "import pathlib, sys; pathlib.Path('kernel').write_text(' '.join(sys.argv[1:]))"
        for name, version in (("torch", "2.13.0+cpu"), ("torch", "2.13.0"), ("vllm", "0.32.0")):
            wheel(self.wheels, name, version)
        wheel(self.wheels, "ipykernel", "7.4.0", said)

    def run(self, *arguments: str, gpu: bool = False, **variables: str) -> subprocess.CompletedProcess:
        """`./run_all.sh ...`, nothing of this environment in sight but a Python."""
        tools = self.place.parent / "tools"
        tools.mkdir(exist_ok=True)
        (tools / "nvidia-smi").write_text(GPU_MACHINE if gpu else "#!/bin/sh\nexit 9\n")
        (tools / "nvidia-smi").chmod(0o755)
        hidden = ("PIP_", "CONDA", "CAI_EM_", "PYTHON", "VIRTUAL_ENV")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
        offline = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.wheels)}
        path = f"{tools}:{Path(sys.executable).resolve().parent}:{kept['PATH']}"
        return subprocess.run(
            [self.place / "run_all.sh", *arguments],
            env={**kept, **offline, "PATH": path, **variables}, capture_output=True, text=True, check=False,
        )  # fmt: skip

    def installed(self) -> dict[str, str]:
        """Package -> version in the environment that it made."""
        (site,) = self.place.glob(".venv/lib/python3*/site-packages")
        return {d.metadata["Name"]: d.version for d in importlib.metadata.distributions(path=[str(site)])}


@pytest.fixture(scope="module")
def fresh(root, tmp_path_factory):
    if sys.platform != "linux":
        pytest.skip("the choice between CPU and CUDA builds is Linux's")
    return Fresh(root, tmp_path_factory.mktemp("fresh"))


def test_set_up_in_a_clean_folder(fresh):
    done = fresh.run("setup")
    assert done.returncode == 0, done.stderr
    assert "making .venv with Python 3" in done.stderr
    assert "2 locked packages from requirements/cpu.lock" in done.stderr
    assert "Quarto could not be installed: the paper will be a preview" in done.stderr
    steps = [line.strip() for line in done.stderr.splitlines() if line.endswith(" ...")]
    assert steps[:2] == ["PyTorch ...", "the locked packages ..."], "a line for each step, and nothing of what pip says"
    assert "Successfully installed" not in done.stderr
    assert "Successfully installed" in (fresh.place / ".venv" / "setup.log").read_text()
    found = fresh.installed()
    assert {"cai-em": "0.1.0", "torch": "2.13.0+cpu", "ipykernel": "7.4.0"}.items() <= found.items()
    assert (fresh.place / "kernel").read_text().startswith("install --sys-prefix --name cai-em")
    log = (fresh.place / ".venv" / "setup.log").stat().st_mtime_ns
    again = fresh.run("setup")
    assert (fresh.place / ".venv" / "setup.log").stat().st_mtime_ns == log, "nothing is installed a second time"
    assert again.stderr.count("==") == 1, f"the second time it only says that it is ready: {again.stderr}"


def test_an_interrupted_set_up_is_made_anew(fresh):
    (site,) = fresh.place.glob(".venv/lib/python3*/site-packages")
    for path in site.glob("pip*"):
        shutil.rmtree(path)
    (fresh.place / ".venv" / ".cai-em-stamp").unlink()
    done = fresh.run("setup")
    assert done.returncode == 0, done.stderr
    assert {"pip", "torch", "cai-em"} <= fresh.installed().keys()


def test_a_gpu_study_for_a_cluster_is_set_up_for_gpus_where_there_is_none(fresh):
    """The CPU build of torch satisfies the CUDA lock's pin; it must not stay."""
    fresh.run("demo", "--profile", "slurm")
    assert fresh.installed()["torch"] == "2.13.0+cpu"
    done = fresh.run("paper", "--profile", "slurm", "--dry-run")
    assert "3 locked packages from requirements/cuda.lock" in done.stderr
    assert {"torch": "2.13.0", "vllm": "0.32.0"}.items() <= fresh.installed().items()
    assert "as planned" in done.stderr, "after it, the run begins"
    assert "locked packages" not in fresh.run("setup").stderr, "the environment stays one for GPUs"


def test_the_lock_is_chosen_by_hand_or_by_the_gpu_and_a_cpu_build_cannot_take_cudas_place(fresh):
    done = fresh.run("setup", CAI_EM_LOCK="gpu")
    assert done.returncode == 2
    assert "CAI_EM_LOCK is 'gpu': it may be cpu or cuda" in done.stderr
    assert fresh.run("setup", CAI_EM_LOCK="cpu").returncode == 0
    assert fresh.installed()["torch"] == "2.13.0+cpu"
    (fresh.wheels / "torch-2.13.0-py3-none-any.whl").unlink()
    done = fresh.run("setup", gpu=True)
    assert done.returncode == 2
    assert "requirements/cuda.lock" in done.stderr
    assert "only the CPU build of torch==2.13.0" in done.stderr


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
            assert canonicalize_name(module) in pins(root / "requirements" / OPTIONAL[module])
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


# --- The code's own form -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff_has_nothing_to_say(root, command):
    """Library, tests, benchmarks and notebooks."""
    ruff = Path(sys.executable).with_name("ruff")
    done = subprocess.run([ruff, *command, "--no-cache", "--quiet", root], capture_output=True, text=True)
    assert done.returncode == 0, f"ruff {' '.join(command)} (mend with: ruff {command[0]} .)\n{done.stdout[-3000:]}"


@pytest.mark.parametrize("asked", [["--help"], ["-h"], ["audit", "--help"]])
def test_help_says_the_commands_and_does_nothing(asked, root, tmp_path):
    shutil.copy(root / "run_all.sh", tmp_path)
    done = subprocess.run([tmp_path / "run_all.sh", *asked], capture_output=True, text=True)
    assert done.returncode == 0
    for command in ("audit PATH...", "calibrate-judge KEY", "freeze PROFILE", "verify [PROFILE]"):
        assert f"./run_all.sh {command}" in done.stdout
    assert not done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["run_all.sh"]
