"""Running notebooks: executed copies, failures kept, locks; manifests that catch a changed byte; staleness."""

import json
import subprocess
import sys

import nbformat
import pytest
from cai_em import run


def write_notebook(path, *cells, parameters="x = 1"):
    """A notebook with a parameters cell and some code cells."""
    kernel = {"name": "cai-em", "display_name": "CAI x EM", "language": "python"}
    nb = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
    nb.cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    nb.cells += [nbformat.v4.new_code_cell(cell) for cell in cells]
    nbformat.write(nb, path)
    return path


# --- Staleness ---


def test_code_hash_ignores_prose_and_comments(tmp_path):
    one = write_notebook(tmp_path / "a.ipynb", "y = x + 1")
    same = write_notebook(tmp_path / "b.ipynb", "# why\ny = (x +\n     1)\n%matplotlib inline")
    other = write_notebook(tmp_path / "c.ipynb", "y = x + 2")
    assert run.code_hash(one) == run.code_hash(same) != run.code_hash(other)


def test_code_hash_ignores_injected_parameters(tmp_path):
    one = write_notebook(tmp_path / "a.ipynb", "y = x")
    nb = nbformat.read(one, 4)
    nb.cells.insert(1, nbformat.v4.new_code_cell("x = 7", metadata={"tags": ["injected-parameters"]}))
    nbformat.write(nb, tmp_path / "b.ipynb")
    assert run.code_hash(one) == run.code_hash(tmp_path / "b.ipynb")


def test_modules_are_found_transitively_and_in_functions(tmp_path):
    (tmp_path / "a.py").write_text("from cai_em import b\n")
    (tmp_path / "b.py").write_text("def f():\n    from cai_em.c import g\n")
    (tmp_path / "c.py").write_text("import json\n")
    (tmp_path / "d.py").write_text("")
    (tmp_path / "params.py").write_text("from cai_em import d\n")
    found = run.modules_of("from cai_em import a, params\nimport cai_em.a", tmp_path)
    assert [p.name for p in found] == ["a.py", "b.py", "c.py"]


def test_a_docstring_does_not_change_a_modules_meaning_but_a_default_does():
    assert run._meaning('def f(x=1):\n    "One."\n') == run._meaning('def f(x=1):\n    "Two."  # no\n')
    assert run._meaning("def f(x=1): pass") != run._meaning("def f(x=2): pass")


# --- Manifests ---


def test_manifest_records_and_verify_catches_a_changed_byte(tmp_path):
    source, product = tmp_path / "in.txt", tmp_path / "stage" / "adapter"
    source.write_text("in")
    product.mkdir(parents=True)
    (product / "weights.bin").write_bytes(b"12345")
    run.write_manifest(
        tmp_path / "stage", stage="02_finetune", inputs=[source], outputs=[product], params={"r": 4}, seeds=[0]
    )
    record = run.read_manifest(tmp_path / "stage")
    assert record["params"] == {"r": 4}
    assert record["versions"]["torch"]
    assert run.verify(tmp_path) == {"manifests": 1, "files": 2}
    (product / "weights.bin").write_bytes(b"12346")
    source.unlink()
    with pytest.raises(run.VerificationError) as caught:
        run.verify(tmp_path)
    assert "weights.bin does not match" in str(caught.value)
    assert "in.txt is missing" in str(caught.value)


def test_verify_of_nothing_is_an_error(tmp_path):
    with pytest.raises(run.VerificationError, match="no manifest"):
        run.verify(tmp_path)


def test_run_id_depends_on_content_only():
    assert run.run_id("s", {"a": 1, "b": 2}) == run.run_id("s", {"b": 2, "a": 1}) != run.run_id("s", {"a": 2, "b": 2})


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = run.write_text(tmp_path / "a.txt", "old")

    def half_written():
        with run.atomic(path) as part:
            part.write_text("half")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        half_written()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_lone_surrogate_survives_as_text(tmp_path):
    assert run.write_text(tmp_path / "a.txt", "x\ud800\x00y").read_text() == "x\\ud800\x00y"


# --- Execution ---


def test_execute_injects_parameters_and_keeps_the_executed_copy(tmp_path, capsys):
    source = write_notebook(tmp_path / "nb.ipynb", "print('x is', x)")
    out = run.execute(source, tmp_path / "runs" / "nb.ipynb", {"x": 42})
    text = "".join(c.outputs[0].text for c in nbformat.read(out, 4).cells if c.cell_type == "code" and c.outputs)
    assert text == "x is 42\n"
    assert [p.name for p in out.parent.iterdir() if not p.name.startswith(".")] == ["nb.ipynb"]


def test_a_failing_notebook_is_kept_with_its_error_and_the_old_copy_stays(tmp_path, capsys):
    import papermill

    out = tmp_path / "runs" / "nb.ipynb"
    run.execute(write_notebook(tmp_path / "good.ipynb", "1"), out, {})
    before = out.read_bytes()
    bad = write_notebook(tmp_path / "bad.ipynb", "raise ValueError('no such thing')")
    with pytest.raises(papermill.PapermillExecutionError, match="no such thing"):
        run.execute(bad, out, {})
    assert "no such thing" in (out.parent / "nb.failed.ipynb").read_text()
    assert out.read_bytes() == before
    assert "nb.failed.ipynb" in capsys.readouterr().err


def test_an_undeclared_parameter_is_refused(tmp_path):
    source = write_notebook(tmp_path / "nb.ipynb", "1")
    with pytest.raises(ValueError, match=r"declares no parameter \['y'\]"):
        run.execute(source, tmp_path / "out.ipynb", {"y": 1})


def test_the_same_cell_is_never_run_twice_at_once(tmp_path):
    log = tmp_path / "log"
    body = f"import time\nfor word in ('in', 'out'):\n    open({str(log)!r}, 'a').write(word + ' ')\n    time.sleep(1)"
    source = write_notebook(tmp_path / "nb.ipynb", body)
    command = [sys.executable, "-m", "cai_em.run", "execute", str(source), str(tmp_path / "o.ipynb"), json.dumps({})]
    both = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [p.wait(timeout=120) for p in both] == [0, 0]
    assert log.read_text() == "in out in out "
