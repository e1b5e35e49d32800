"""The meaning of code: what makes a job stale, followed through packages, doors and relative imports."""

import nbformat
import pytest
from cai_em.records import code


def write_notebook(path, *cells, parameters="x = 1", look=()):
    """A notebook with a parameters cell, cells that compute and cells that only show."""
    nb = nbformat.v4.new_notebook()
    nb.cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    nb.cells += [nbformat.v4.new_code_cell(cell) for cell in cells]
    nb.cells += [nbformat.v4.new_code_cell(cell, metadata={"tags": ["look"]}) for cell in look]
    nbformat.write(nb, path)
    return path


@pytest.fixture
def house(tmp_path):
    """A library of packages: two rooms behind a door, one of which imports its neighbour, and a flat module."""
    files = {
        "__init__.py": '__version__ = "1"\n',
        "flat.py": "import json\n",
        "inner/__init__.py": "from cai_em.inner.one import first\nfrom .two import second\nLEVEL = 3\n",
        "lazy/__init__.py": "import lazy_loader\n"
        '__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"room": ["chair"]})\n',
        "lazy/room.py": "from cai_em.outer import thing\nchair = thing\n",
        "lazy/other.py": "",
        "inner/one.py": "def first(): pass\n",
        "inner/two.py": "from . import three\ndef second(): return three.x\n",
        "inner/three.py": "def f():\n    from ..flat import y\n",
        "inner/deep/__init__.py": "",
        "inner/deep/down.py": "from ...outer import thing\n",
        "outer.py": "thing = 1\n",
    }
    for name, text in files.items():
        path = tmp_path / "cai_em" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "cai_em"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from cai_em import flat\nflat.y", ["flat"]),
        ("import cai_em.flat", ["flat"]),
        ("import cai_em.flat as f\nf.y", ["flat"]),
        ("def f():\n    from cai_em.flat import y\n    return y", ["flat"]),
        ("from cai_em.inner import first\nfirst()", ["inner/one"]),
        ("from cai_em import inner\ninner.first()", ["inner/one"]),
        ("from cai_em import inner as i\ni.second()", ["flat", "inner/three", "inner/two"]),
        ("from cai_em.lazy import chair\nchair", ["lazy/room", "outer"]),
        ("from cai_em import lazy\nlazy.chair", ["lazy/room", "outer"]),
        ("from cai_em.inner import LEVEL\nLEVEL", ["flat", "inner/__init__", "inner/one", "inner/three", "inner/two"]),
        ("from cai_em.inner.deep import down\ndown.thing", ["inner/deep/down", "outer"]),
        ("from cai_em.inner.deep.down import thing\nthing", ["inner/deep/down", "outer"]),
        ("import cai_em.inner.two", ["flat", "inner/three", "inner/two"]),
        ("from cai_em import __version__\n__version__", []),
        ("from cai_em import flat, inner\nflat.y", ["flat"]),  # imported, and not used
        ("import json", []),
    ],
)
def test_what_is_used_is_followed_through_doors_and_relative_imports(house, source, expected):
    found = code.modules_of(source, house)
    assert [str(f.relative_to(house).with_suffix("")) for f in found] == expected


def test_a_package_that_is_used_whole_counts_whole(house):
    found = code.modules_of("from cai_em import inner\nprint(inner)", house)
    assert {f.stem for f in found} == {"__init__", "one", "two", "three", "down", "flat", "outer"}


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("from cai_em import nowhere\nnowhere.f", "takes nowhere from cai_em"),
        ("import cai_em.nowhere", "imports cai_em.nowhere, which is not there"),
        ("from cai_em.nowhere import f\nf()", "imports cai_em.nowhere, which is not there"),
        ("from cai_em.inner import third\nthird()", "takes third from cai_em.inner, whose door"),
        ("from cai_em import inner\ninner.third()", "takes third from cai_em.inner, whose door"),
    ],
)
def test_a_module_that_cannot_be_found_is_an_error(house, source, complaint):
    with pytest.raises(code.CodeError, match=complaint):
        code.modules_of(source, house, "the notebook")


def test_a_module_behind_the_used_one_that_cannot_be_found_is_an_error_too(house):
    (house / "flat.py").write_text("from cai_em.inner import gone\n")
    with pytest.raises(code.CodeError, match=r"cai_em\.flat takes gone from cai_em\.inner"):
        code.modules_of("import cai_em.flat", house)


def test_parameters_and_settings_are_not_code(house, monkeypatch):
    monkeypatch.setattr(code, "NOT_HASHED", ("cai_em.inner",))
    assert [f.stem for f in code.modules_of("from cai_em import flat, inner\nflat.y, inner.first", house)] == ["flat"]


def test_a_docstring_does_not_change_a_modules_meaning_but_a_default_does():
    assert code.meaning('def f(x=1):\n    "One."\n') == code.meaning('def f(x=1):\n    "Two."  # no\n')
    assert code.meaning("def f(x=1): pass") != code.meaning("def f(x=2): pass")


# --- Notebooks -----------------------------------------------------------------------------------------------------


def test_prose_and_comments_do_not_count(tmp_path):
    one = write_notebook(tmp_path / "a.ipynb", "y = x + 1")
    same = write_notebook(tmp_path / "b.ipynb", "# why\ny = (x +\n     1)\n%matplotlib inline")
    other = write_notebook(tmp_path / "c.ipynb", "y = x + 2")
    assert code.code_hash(one) == code.code_hash(same) != code.code_hash(other)


def test_what_only_shows_does_not_count_nor_does_what_is_imported_for_it(tmp_path):
    bare = write_notebook(tmp_path / "a.ipynb", "y = x + 1")
    shown = write_notebook(
        tmp_path / "b.ipynb", "import math\nfrom cai_em import code\ny = x + 1", look=["code.code_hash(y)"]
    )
    assert code.code_hash(bare) == code.code_hash(shown)


def test_injected_parameters_do_not_count(tmp_path):
    one = write_notebook(tmp_path / "a.ipynb", "y = x")
    nb = nbformat.read(one, 4)
    nb.cells.insert(1, nbformat.v4.new_code_cell("x = 7", metadata={"tags": ["injected-parameters"]}))
    nbformat.write(nb, tmp_path / "b.ipynb")
    assert code.code_hash(one) == code.code_hash(tmp_path / "b.ipynb")


def test_the_values_that_a_notebook_opens_with_do_not_count_but_their_names_do(tmp_path):
    def opened_with(text):
        return code.code_hash(write_notebook(tmp_path / "a.ipynb", "y = persona", parameters=text))

    first = opened_with('persona = "poeticism"\nseed = 0')
    assert first == opened_with('persona = "sycophancy"\nseed = 1')
    assert first != opened_with('persona = "poeticism"')


def test_a_caches_key_changes_with_the_module_and_with_what_it_imports(house, monkeypatch):
    monkeypatch.setattr(code, "library_folder", lambda: house)

    def key():
        code._module.cache_clear()
        return code.meaning_of("cai_em.inner.two")

    first = key()
    (house / "flat.py").write_text("import json  # a comment\n")
    assert key() == first
    (house / "flat.py").write_text("import json, os\n")
    assert key() != first
