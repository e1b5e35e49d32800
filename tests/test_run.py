"""Running notebooks: executed copies, failures kept, locks; manifests that catch a changed byte; staleness."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from cai_em.records import files as records_files
from cai_em.records import manifest
from cai_em.study import loading
from cai_em.workflow import run


def write_notebook(path, *cells, parameters="x = 1"):
    """A notebook with a parameters cell and some code cells."""
    kernel = {"name": "cai-em", "display_name": "CAI x EM", "language": "python"}
    nb = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
    nb.cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    nb.cells += [nbformat.v4.new_code_cell(cell) for cell in cells]
    nbformat.write(nb, path)
    return path


# --- Manifests ---


def test_manifest_records_and_verify_catches_a_changed_byte(tmp_path):
    source, product = tmp_path / "in.txt", tmp_path / "stage" / "adapter"
    source.write_text("in")
    product.mkdir(parents=True)
    (product / "weights.bin").write_bytes(b"12345")
    manifest.write_manifest(
        tmp_path / "stage", stage="02_finetune", inputs=[source], outputs=[product], params={"r": 4}, seeds=[0]
    )
    record = manifest.read_manifest(tmp_path / "stage")
    assert record["params"] == {"r": 4}
    assert record["versions"]["torch"]
    assert manifest.verify(tmp_path) == {"manifests": 1, "files": 2, "elsewhere": 0}
    (product / "weights.bin").write_bytes(b"12346")
    source.unlink()
    with pytest.raises(manifest.VerificationError) as caught:
        manifest.verify(tmp_path)
    assert "weights.bin does not match" in str(caught.value)
    assert "in.txt is missing" in str(caught.value)


def test_what_is_made_again_and_is_the_same_is_kept_as_it_is(tmp_path):
    """ "Run all" in JupyterLab on a finished run: neither `verify` nor Snakemake may take it for another."""

    def make(text, **more):
        records_files.write_text(tmp_path / "stage" / "t.txt", text)
        more |= {"stage": "05", "inputs": [], "outputs": [tmp_path / "stage" / "t.txt"], "params": {"a": 1}}
        return manifest.write_manifest(tmp_path / "stage", **more)

    def state():
        return [(p.read_bytes(), p.stat().st_mtime_ns) for p in sorted((tmp_path / "stage").iterdir())]

    path = make("one", timings={"all": 1.5}, usage={"calls": 10})
    first = state()
    make("one", timings={"all": 9.9}, usage={"calls": 0})
    assert state() == first
    assert json.loads(path.read_text())["usage"] == {"calls": 10}, "what it cost to make it"
    make("one", judge_auc=0.9)
    assert json.loads(path.read_text())["judge_auc"] == 0.9
    make("two", judge_auc=0.9)
    assert manifest.verify(tmp_path) == {"manifests": 1, "files": 1, "elsewhere": 0}
    assert (tmp_path / "stage" / "t.txt").read_text() == "two"
    path.write_text(path.read_text()[:50])
    make("two")
    assert manifest.read_manifest(path.parent)["stage"] == "05", "half a manifest is replaced"


@pytest.fixture
def finished(tmp_path):
    """A finished run of three stages, sealed: 05 reads what 03 and 04 made."""
    results = tmp_path / "results" / "demo"
    files = {name: results / name for name in ("03/r.parquet", "04/s.parquet", "05/t.parquet")}
    for extra in ("RESULTS.md", "paper/index.html", "notebooks/03.ipynb", "notebooks/04.failed.ipynb", "logs/03.log"):
        files[extra] = results / extra
    for path in files.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)
    r, s, t = list(files.values())[:3]
    for out, inputs in ((r, []), (s, [r]), (t, [r, s])):
        manifest.write_manifest(out.parent, stage=out.parent.name, inputs=inputs, outputs=[out], params={}, seeds=[0])
    manifest.seal(results, params={"profile": "demo"})
    return results


def problems(results, expected=()):
    """The lines of `verify`'s error after its head."""
    with pytest.raises(manifest.VerificationError) as caught:
        manifest.verify(results, expected)
    head, *lines = str(caught.value).splitlines()
    return head, lines


def test_a_run_is_vouched_for_as_a_whole(finished):
    assert manifest.verify(finished, [finished / "03", finished]) == {"manifests": 4, "files": 9, "elsewhere": 0}
    record = manifest.read_manifest(finished)
    assert {Path(name).name for name in record["outputs"]} == {"RESULTS.md", "index.html", "03.ipynb"}
    for name in ("RESULTS.md", "paper/index.html", "notebooks/03.ipynb"):
        before = (finished / name).read_text()
        (finished / name).write_text("forged")
        assert f"{name} does not match" in problems(finished)[1][0]
        (finished / name).write_text(before)
    (finished / "logs/03.log").write_text("another time")
    manifest.verify(finished)


def test_a_changed_file_counts_once_and_those_that_used_it_are_named(finished):
    (finished / "03/r.parquet").write_text("changed")
    head, lines = problems(finished)
    assert "1 of 9 files" in head
    (line,) = lines
    assert line.count("r.parquet") == 1
    assert all(f"{kind} of " in line and f"/{stage}" in line for kind, stage in (("output", "03"), ("input", "05")))


def test_a_changed_table_whose_manifest_was_deleted(finished):
    (finished / "05/t.parquet").write_text("changed")
    (finished / "05/manifest.json").unlink()
    assert any("05/manifest.json is missing" in line for line in problems(finished, [finished / "05"])[1])
    assert any("05/manifest.json is missing" in line for line in problems(finished)[1]), "the run's manifest knows it"


def test_a_manifest_that_is_not_whole_is_named(finished):
    path = finished / "05/manifest.json"
    whole = path.read_text()
    for torn in (whole[:100], "", "[]", '{"inputs": 3, "outputs": {}}'):
        path.write_text(torn)
        assert any("05/manifest.json is not a whole manifest" in line for line in problems(finished)[1])
        with pytest.raises(manifest.ManifestError, match=r"05/manifest\.json .* delete it"):
            manifest.read_manifest(finished / "05")


def test_an_edited_manifest_is_noticed(finished):
    path = finished / "05/manifest.json"
    path.write_text(path.read_text().replace('"seeds": [\n  0\n ]', '"seeds": [\n  999\n ]'))
    assert "999" in path.read_text()
    (line,) = problems(finished)[1]
    assert "05/manifest.json does not match" in line


def test_an_input_from_elsewhere_that_is_gone_is_counted_and_no_error(tmp_path, finished):
    """A model in a cache that was emptied: results can still be verified, and it is said what was not."""
    weights = tmp_path / "cache" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_text("w")
    manifest.write_manifest(
        finished / "03", stage="03", inputs=[weights], outputs=[finished / "03/r.parquet"], params={}
    )
    manifest.seal(finished, params={})
    assert manifest.verify(finished)["elsewhere"] == 0
    weights.write_text("others")
    assert "model.safetensors does not match" in problems(finished)[1][0]
    weights.unlink()
    assert manifest.verify(finished)["elsewhere"] == 1


def test_verify_by_name_follows_the_profile_and_cai_em_results(finished, root, monkeypatch, capsys):
    monkeypatch.setenv("CAI_EM_RESULTS", str(finished.parent))
    monkeypatch.chdir(root)
    assert run.main(["verify", "demo"]) == 1, "the demo's stages are not there"
    said = capsys.readouterr().err
    study = loading.load("demo")
    assert study.dir == finished
    assert said.count("is missing: the stage has not run") == len(study.artefact_dirs()) - 1
    finished.rename(finished.with_name("mine"))
    (finished.parent / "judge_cache.sqlite").write_text("")
    assert run.main(["verify"]) == 1, "the manifests name files that were renamed away"
    assert "mine: " in capsys.readouterr().err
    assert run.main(["verify", "nosuch"]) == 1


def test_verify_of_nothing_is_an_error(tmp_path):
    with pytest.raises(manifest.VerificationError, match="no manifest"):
        manifest.verify(tmp_path)


def test_run_id_depends_on_content_only():
    assert (
        manifest.run_id("s", {"a": 1, "b": 2})
        == manifest.run_id("s", {"b": 2, "a": 1})
        != manifest.run_id("s", {"a": 2, "b": 2})
    )


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = records_files.write_text(tmp_path / "a.txt", "old")

    def half_written():
        with records_files.atomic(path) as part:
            part.write_text("half")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        half_written()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def dead_process() -> int:
    """The number of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def test_what_killed_writers_left_is_removed_by_the_next_one(tmp_path):
    """And nothing else: not what another process is writing, nor another machine, nor another file's."""
    dead, name = dead_process(), f".a.txt.part-{records_files._HOST}"
    for left in (f"{name}-{dead}", f"{name}-{os.getpid()}"):
        (tmp_path / left).write_text("half")
    folder = tmp_path / f".adapter.part-{records_files._HOST}-{dead}.old"
    folder.mkdir()
    (folder / "weights").write_text("half")
    others = [f"{name}-1", f".a.txt.part-elsewhere-{dead}", f".b.txt.part-{records_files._HOST}-{dead}"]
    for other in others:
        (tmp_path / other).write_text("half")
    records_files.write_text(tmp_path / "a.txt", "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*others, folder.name, "a.txt"])
    with records_files.atomic_folder(tmp_path / "adapter") as part:
        (part / "weights").write_text("whole")
    assert not folder.exists()
    assert (tmp_path / "adapter/weights").read_text() == "whole"


def test_a_folder_is_replaced_as_a_whole(tmp_path, monkeypatch):
    place = tmp_path / "adapter"

    def write(text):
        with records_files.atomic_folder(place) as part:
            (part / text).write_text(text)
            if text == "fails":
                raise RuntimeError(text)

    write("old")
    with pytest.raises(RuntimeError):
        write("fails")
    assert [p.name for p in place.iterdir()] == ["old"]
    replace, seen = os.replace, []

    def watched(source, target):
        """At each step the old folder or the new one is there, whole, under some name."""
        seen.append(sorted(p.name for p in tmp_path.rglob("*") if p.is_file()))
        if len(seen) == 2:
            raise OSError("no room")
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    with pytest.raises(OSError, match="no room"):
        write("new")
    assert [p.name for p in place.iterdir()] == ["old"], "what was there is back"
    assert seen[1] == ["new", "old"], "the old one is renamed, not deleted, before the new one has its name"
    monkeypatch.setattr(os, "replace", replace)
    write("new")
    assert [p.name for p in tmp_path.rglob("*")] == ["adapter", "new"]


def test_a_lone_surrogate_survives_as_text(tmp_path):
    assert records_files.write_text(tmp_path / "a.txt", "x\ud800\x00y").read_text() == "x\\ud800\x00y"


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


def test_a_copy_that_cannot_be_written_is_kept_as_failed_and_the_room_is_told(tmp_path, capsys, monkeypatch):
    """A full disk: papermill stops with an OSError while it writes the copy."""
    from papermill import iorw

    source, out = write_notebook(tmp_path / "nb.ipynb", "print('x')", "2"), tmp_path / "notebooks" / "nb.ipynb"
    write, done = iorw.LocalHandler.write, []

    def full(self, buffer, path):
        done.append(path)
        if len(done) > 3:
            raise OSError(28, "No space left on device")
        write(self, buffer, path)

    monkeypatch.setattr(iorw.LocalHandler, "write", full)
    with pytest.raises(OSError, match="No space left"):
        run.execute(source, out, {})
    said = capsys.readouterr().err
    assert "nb.failed.ipynb" in said
    assert "No space left" in said
    assert "are free" in said
    assert [p.name for p in out.parent.iterdir() if not p.name.startswith(".")] == ["nb.failed.ipynb"]


def test_failures_name_notebooks_that_were_killed_too(tmp_path):
    (tmp_path / "notebooks/02/a").mkdir(parents=True)
    (tmp_path / "logs/02/a").mkdir(parents=True)
    for name in ("seed0.failed", "seed1.running", "seed2"):
        (tmp_path / f"notebooks/02/a/{name}.ipynb").write_text("{}")
        (tmp_path / f"logs/02/a/{name.split('.')[0]}.log").write_text(f"...\nError of {name}\n\n")
    found = {path.name: error for path, error in run.failures(tmp_path).items()}
    assert found == {
        "seed0.failed.ipynb": "Error of seed0.failed",
        "seed1.running.ipynb": "Error of seed1.running",
    }


def test_an_undeclared_parameter_is_refused(tmp_path):
    source = write_notebook(tmp_path / "nb.ipynb", "1")
    with pytest.raises(ValueError, match=r"declares no parameter \['y'\]"):
        run.execute(source, tmp_path / "out.ipynb", {"y": 1})


def test_the_same_cell_is_never_run_twice_at_once(tmp_path):
    log = tmp_path / "log"
    body = f"import time\nfor word in ('in', 'out'):\n    open({str(log)!r}, 'a').write(word + ' ')\n    time.sleep(1)"
    source = write_notebook(tmp_path / "nb.ipynb", body)
    command = [
        sys.executable,
        "-m",
        "cai_em.workflow.run",
        "execute",
        str(source),
        str(tmp_path / "o.ipynb"),
        json.dumps({}),
    ]
    both = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [p.wait() for p in both] == [0, 0]
    assert log.read_text() == "in out in out "
