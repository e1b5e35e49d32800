"""One GPU for each job: pretended ones, real locks, real kernels. (Training and sampling on a real one: marked gpu.)"""

import os
import threading
import time

import nbformat
import pytest
from cai_em.workflow import gpu, run

from tests.test_run import write_notebook


@pytest.fixture
def two_gpus(tmp_path, monkeypatch):
    """A machine whose nvidia-smi lists two GPUs, with lock files of its own."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\nprintf '0\\n1\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(gpu.tempfile, "gettempdir", lambda: str(tmp_path))
    for name in (gpu.VISIBLE, "SLURM_JOB_ID", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_each_job_gets_a_gpu_of_its_own_and_the_third_waits(two_gpus):
    got, first_is_free = [], threading.Event()

    def third():
        with gpu.one_gpu(poll_s=0.01) as name:
            got.append((name, first_is_free.is_set()))

    with gpu.one_gpu() as one:
        os.environ.pop(gpu.VISIBLE)  # what a second process would not see
        with gpu.one_gpu() as two:
            assert (one, two) == ("0", "1")
            assert os.environ[gpu.VISIBLE] == "1"
            os.environ.pop(gpu.VISIBLE)
            waiting = threading.Thread(target=third)
            waiting.start()
            time.sleep(0.1)
            assert got == []
            first_is_free.set()
        waiting.join()
    assert got == [("1", True)]
    assert gpu.VISIBLE not in os.environ


def test_a_visible_list_is_kept_to_and_slurms_one_is_left_alone(two_gpus, monkeypatch):
    monkeypatch.setenv(gpu.VISIBLE, "3, 5")
    for allocation in (None, "7"):  # `salloc --gpus=2`, and run_all.sh in it: its jobs share the two
        if allocation:
            monkeypatch.setenv("SLURM_JOB_ID", allocation)
        with gpu.one_gpu() as name:
            assert name == os.environ[gpu.VISIBLE] == "3"
        assert os.environ[gpu.VISIBLE] == "3, 5"
    monkeypatch.setenv(gpu.VISIBLE, "3")  # a job of its own, which SLURM gave one
    with gpu.one_gpu() as name:
        assert name is None
        assert os.environ[gpu.VISIBLE] == "3"


@pytest.mark.parametrize(("built", "said"), [("None", "built without CUDA"), ("13.0", "570.1, a card")])
def test_a_job_that_was_given_a_gpu_and_sees_none_stops(two_gpus, monkeypatch, built, said):
    (two_gpus / "bin" / "nvidia-smi").write_text("#!/bin/sh\necho 570.1, a card\n")
    monkeypatch.setattr(gpu, "ASKED_OF_TORCH", f"print('False', {built!r})")
    source = write_notebook(two_gpus / "n.ipynb", "print('trained')")
    monkeypatch.setenv("CAI_EM_JOB_GPUS", "1")
    with pytest.raises(gpu.NoGpu, match=f"sees none, so it stops before it trains on the CPU.*{said}"):
        run.execute(source, two_gpus / "out" / "n.ipynb", {})
    assert not list((two_gpus / "out").glob("n*.ipynb"))
    monkeypatch.setattr(gpu, "ASKED_OF_TORCH", "print(True, '13.0')")
    run.execute(source, two_gpus / "out" / "n.ipynb", {})


def test_nothing_happens_without_a_gpu_or_a_wish(two_gpus, monkeypatch):
    with gpu.one_gpu(wanted=False) as name:
        assert name is None
    (two_gpus / "bin" / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    with gpu.one_gpu() as name:
        assert name is None
        assert gpu.VISIBLE not in os.environ


def test_a_notebooks_kernel_sees_one_gpu_where_its_rule_asks_for_one(two_gpus, monkeypatch):
    source = write_notebook(two_gpus / "n.ipynb", "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES'))")
    monkeypatch.setattr(gpu, "ASKED_OF_TORCH", "print(True, '13.0')")
    said = {}
    for wish in ("0", "1"):
        monkeypatch.setenv("CAI_EM_JOB_GPUS", wish)
        executed = run.execute(source, two_gpus / wish / "n.ipynb", {})
        said[wish] = nbformat.read(executed, 4).cells[-1].outputs[0].text.strip()
    assert said == {"0": "None", "1": "0"}
