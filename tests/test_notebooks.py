"""What every committed notebook promises: no outputs, a parameters cell, short cells, no logic of its own."""

import ast
import re
import symtable
from pathlib import Path

import nbformat
import pytest
from cai_em.records.code import LOOK, modules_of
from IPython.core.inputtransformer2 import TransformerManager

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda p: p.stem)
def notebook(request):
    return nbformat.read(request.param, 4)


def code(nb):
    return [c for c in nb.cells if c.cell_type == "code"]


def test_all_stages_are_there():
    assert [p.stem for p in NOTEBOOKS] == [
        "00_explore",
        "01_personas",
        "02_finetune",
        "03_sample",
        "04_judge",
        "05_validity",
        "06_results",
        "07_audit",
        "07_published",
        "08_claims",
        "09_trajectories",
        "10_steering",
        "11_report",
    ]


def test_committed_without_outputs(notebook):
    assert all(not c.outputs and c.execution_count is None for c in code(notebook))


def test_one_parameters_cell_with_literal_defaults(notebook):
    cells = [c for c in code(notebook) if "parameters" in c.metadata.get("tags", [])]
    assert len(cells) == 1
    for statement in ast.parse(cells[0].source).body:
        assert isinstance(statement, ast.Assign | ast.AnnAssign), ast.unparse(statement)
        ast.literal_eval(statement.value)


def test_kernel_is_the_projects(notebook):
    kernel = notebook.metadata.kernelspec
    assert (kernel.name, kernel.display_name, kernel.language) == ("cai-em", "CAI x EM", "python")


def test_prose_comes_first_and_there_is_as_much_of_it_as_of_code(notebook):
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# ")
    prose = [c for c in notebook.cells if c.cell_type == "markdown"]
    assert 2 * len(prose) >= len(code(notebook))


def test_cells_are_short_and_define_nothing_worth_testing(notebook):
    for cell in code(notebook):
        source = "\n".join(line for line in cell.source.splitlines() if not line.lstrip().startswith(("%", "!")))
        assert len(source.splitlines()) <= 25, source
        for node in ast.walk(ast.parse(source)):
            assert not isinstance(node, ast.ClassDef), source
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert len(ast.unparse(node).splitlines()) <= 4, source


def test_no_path_or_key_of_somebodys_machine(notebook):
    text = "\n".join(c.source for c in notebook.cells)
    assert not re.search(r"/(home|root|work|tmp|Users)/|sk-[A-Za-z0-9]{8}", text)


def test_its_library_modules_exist(notebook, root):
    code_cells = "\n".join(
        line for c in code(notebook) for line in c.source.splitlines() if not line.lstrip().startswith(("%", "!"))
    )
    assert modules_of(code_cells, root / "lib" / "cai_em")


def test_the_questions_are_those_of_the_data(notebook):
    # `Study.questions` knows the built-in ones; a study with fetched data asks others, and counts must be of those.
    for cell in code(notebook):
        assert "study.questions()" not in cell.source, "use materials.questions(study)"


def split_by_look(nb):
    """The code of the cells that compute, and of those that only show."""
    look = [LOOK in c.metadata.get("tags", []) for c in code(nb)]
    plain = [TransformerManager().transform_cell(c.source) for c in code(nb)]
    return ["\n".join(text for text, only in zip(plain, look) if only == shown) for shown in (False, True)]


def used_globals(table):
    """Names of the notebook that a piece of code uses, in whatever function."""
    whole = table.get_type() == "module"
    found = {s.get_name() for s in table.get_symbols() if s.is_referenced() and (whole or s.is_global())}
    return found.union(*map(used_globals, table.get_children()))


def test_what_only_shows_leaves_nothing_behind(notebook):
    """Cells tagged `look` are no part of what makes a stage stale: nothing that they assign may be computed with."""
    computes, shows = (symtable.symtable(text, "cells", "exec") for text in split_by_look(notebook))
    bound = {s.get_name() for s in shows.get_symbols() if s.is_assigned() or s.is_imported() or s.is_namespace()}
    assert not bound & used_globals(computes)


WRITES = re.compile(
    r"(^|\.)(write\w*|save\w*|savefig|to_(csv|parquet|json)|atomic\w*|mkdir|open|unlink|rmtree|draw_all)$"
)


def test_what_only_shows_writes_no_file(notebook):
    _, shows = split_by_look(notebook)
    called = {ast.unparse(n.func) for n in ast.walk(ast.parse(shows)) if isinstance(n, ast.Call)}
    assert not {name for name in called if WRITES.search(name)}
