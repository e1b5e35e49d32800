"""The meaning of code: what a notebook computes, as a hash that comments, layout and prose do not change.

A job runs again when its notebook's code, or a library module that the notebook uses, has changed in meaning. What is
used is followed by name: through dotted and relative imports, and through a package's door (its `__init__`) to the
module behind the name, so that a notebook that takes one function from a package depends on that function's module
and on what that one imports, not on the whole package.

    code_hash("notebooks/04_judge.ipynb")
    meaning_of("cai_em.sample.sampling")       # for caches: what made this?
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

NOT_HASHED = (
    "cai_em.study.entries",
    "cai_em.study.study",
    "cai_em.study.loading",
    "cai_em.study.depends",
    "cai_em.records.files",
    "cai_em.records.manifest",
    "cai_em.records.code",
    "cai_em.workflow",
)
"""Modules and packages that the hash leaves out: what a stage takes from them is in its settings, or is how it runs."""
LOOK = "look"
"""The tag of notebook cells that only show: what they draw or print is on the screen and in no artefact."""


class CodeError(ValueError):
    """Code names a library module, or something behind a package's door, that is not there. The message names both."""


def meaning(source: str) -> str:
    """A piece of code's syntax tree without docstrings: comments, layout and documentation do not change results."""
    parsed = ast.parse(source)
    for node in ast.walk(parsed):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
            and isinstance(body[0].value.value, str)
        ):
            body[0].value.value = ""
    return ast.dump(parsed)


@dataclass(frozen=True)
class _Library:
    """A package on disk, and what names in it lead to."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    def file(self, dotted: str) -> Path | None:
        """The file of a module, or the door of a package; None where the name is neither."""
        place = self.folder.joinpath(*dotted.split(".")[1:])
        return next((f for f in (place.with_suffix(".py"), place / "__init__.py") if f.is_file()), None)

    def module(self, file: Path) -> str:
        """The dotted name of a file."""
        parts = file.relative_to(self.folder.parent).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def behind(self, package: str, names: Iterable[str] | None, said_by: str) -> Iterator[str]:
        """The modules that hold names of a package (`None`: all that it has).

        Raises:
            CodeError: the package's door has no such name.
        """
        door = self.file(package)
        if door is None:
            raise CodeError(f"{said_by} imports {package}, which is not there")
        if door.name != "__init__.py":
            yield package
            return
        if names is None:
            yield from map(self.module, sorted(door.parent.rglob("*.py")))
            return
        own = {t.id for node in ast.parse(door.read_text(encoding="utf-8")).body for t in _targets(node)}
        through = {name: (module, what) for module, what, name in self._bound(door)}
        for name in names:
            if name in own:
                yield package
            elif name in through and through[name] != (package, name):
                yield from self.target(*through[name], None, said_by)
            elif self.file(f"{package}.{name}"):
                yield from self.behind(f"{package}.{name}", None, said_by)
            else:
                raise CodeError(f"{said_by} takes {name} from {package}, whose door does not have it")

    def target(self, module: str, what: str | None, attributes: set[str] | None, said_by: str) -> Iterator[str]:
        """The modules behind `from module import what`, of which only some attributes are used (`None`: whatever)."""
        if what is None:
            yield from self.behind(module, attributes, said_by)
        elif self.file(f"{module}.{what}") and not self._is_behind(module, what):
            yield from self.behind(f"{module}.{what}", attributes, said_by)
        else:
            yield from self.behind(module, [what], said_by)

    def _is_behind(self, package: str, name: str) -> bool:
        door = self.file(package)
        return door is not None and any(n == name and m != package for m, _, n in self._bound(door))

    def _bound(self, file: Path) -> list[tuple[str, str | None, str]]:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        return [*_imported(tree, self.name, self.module(file), file), *_on_demand(tree, self.module(file))]

    def used(self, source: str, module: str, said_by: str, *, is_door: bool = False) -> set[str]:
        """Dotted names of the library's modules that a piece of code uses, wherever in it.

        Args:
            source: the code.
            module: its own dotted name, for relative imports.
            said_by: how an error calls it.
            is_door: whether it is a package's `__init__`.
        """
        tree = ast.parse(source)
        attributes, bare = _uses(tree)
        found: set[str] = set()
        for base, what, name in _imported(tree, self.name, module, Path("__init__.py" if is_door else "x.py")):
            if what == "__version__":
                continue  # what the library says of itself computes nothing
            if module == said_by or name in bare or name in attributes:
                found |= set(self.target(base, what, None if name in bare else attributes.get(name, set()), said_by))
        return {m for m in found if not any(m == left or m.startswith(f"{left}.") for left in NOT_HASHED)}


def _targets(node: ast.stmt) -> Iterator[ast.Name]:
    """What a statement at the top of a module defines, as names."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield ast.Name(node.name)
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            yield from (x for x in ast.walk(target) if isinstance(x, ast.Name))


def _imported(tree: ast.AST, top: str, module: str, file: Path) -> Iterator[tuple[str, str | None, str]]:
    """(module, name in it or None, name here) of every import of the library in a piece of code."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name == top or alias.name.startswith(f"{top}."):
                    yield alias.name, None, alias.asname or alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *([base] if base else [])])
            if base == top or base.startswith(f"{top}."):
                for alias in node.names:
                    yield base, None if alias.name == "*" else alias.name, alias.asname or alias.name


def _on_demand(tree: ast.AST, package: str) -> Iterator[tuple[str, str, str]]:
    """(module, name in it, name here) of what a door imports on demand (`lazy_loader.attach`)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "lazy_loader.attach":
            for rooms in (ast.literal_eval(k.value) for k in node.keywords if k.arg == "submod_attrs"):
                yield from ((f"{package}.{room}", name, name) for room, names in rooms.items() for name in names)


def _uses(tree: ast.AST) -> tuple[dict[str, set[str]], set[str]]:
    """Name -> the attributes that are taken of it; and the names that are used in any other way.

    A dotted import without `as` (`import cai_em.a`) is used under its whole name, as far as imports go: in any way.
    """
    attributes: dict[str, set[str]] = {}
    owned = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            attributes.setdefault(node.value.id, set()).add(node.attr)
            owned.add(id(node.value))
    bare = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and id(n) not in owned}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            bare |= {alias.name for alias in node.names if "." in alias.name and not alias.asname}
        if isinstance(node, ast.ImportFrom):
            bare |= {alias.name for alias in node.names if alias.name == "*"}
    return attributes, bare


@cache
def _module(library: _Library, file: Path) -> tuple[str, frozenset[str]]:
    source, name = file.read_text(encoding="utf-8"), library.module(file)
    return meaning(source), frozenset(library.used(source, name, name, is_door=file.name == "__init__.py"))


def modules_of(source: str, package: Path, said_by: str = "the code") -> list[Path]:
    """Files of the library modules that a piece of code uses, transitively; those of `NOT_HASHED` left out.

    Args:
        source: the code. Of what it imports, only what it uses counts.
        package: the library's folder.
        said_by: how an error calls the code.

    Raises:
        CodeError: a module, or a name behind a package's door, is not there.
    """
    library = _Library(package)
    todo, found = library.used(source, "", said_by), set()
    while todo:
        file = library.file(todo.pop())
        if file is None or file in found:
            continue
        found.add(file)
        todo |= _module(library, file)[1]
    return sorted(found)


def _hash(source: str, package: Path, said_by: str) -> str:
    found = hashlib.sha256(meaning(source).encode())
    library = _Library(package)
    for path in modules_of(source, package, said_by):
        found.update(library.module(path).encode() + _module(library, path)[0].encode())
    return found.hexdigest()[:16]


def library_folder() -> Path:
    """Where the library lies."""
    return Path(next(p for p in Path(__file__).resolve().parents if p.name == "cai_em"))


def code_cells(notebook: str | Path) -> str:
    """The source of the cells of a notebook that compute, without injected parameters and IPython magics.

    Of the `parameters` cell only the names: its values are for whoever opens the notebook alone; a job has its own.
    Cells tagged `look` only show, and are left out.
    """
    cells = json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]
    source = []
    for cell in cells:
        tags, text = cell.get("metadata", {}).get("tags", []), "".join(cell["source"])
        if cell["cell_type"] != "code" or "injected-parameters" in tags or LOOK in tags:
            continue
        if "parameters" in tags:
            targets = (t for node in ast.parse(text).body if isinstance(node, ast.Assign) for t in node.targets)
            text = "\n".join(sorted(f"{t.id}: object" for t in targets if isinstance(t, ast.Name)))
        source.append(text)
    return "\n".join(line for line in "\n".join(source).splitlines() if not line.lstrip().startswith(("%", "!")))


def code_hash(notebook: str | Path) -> str:
    """Hash of what a notebook computes: the cells that compute, and the library modules that they use, transitively.

    Prose, comments, docstrings and layout do not count, nor does what only shows (see `code_cells`, `NOT_HASHED`).

    Raises:
        CodeError: the notebook, or a module behind it, imports what is not there.
    """
    source = code_cells(notebook)
    # What is imported for the cells that only show is not used in the others, and must not count as their text either.
    return _hash(_without_unused_imports(source), library_folder(), str(notebook))


def _without_unused_imports(source: str) -> str:
    tree = ast.parse(source)
    attributes, bare = _uses(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            used = [a for a in node.names if (n := a.asname or a.name) in bare or n in attributes]
            node.names = used or [ast.alias("nothing")]
    kept = (n for n in tree.body if not (isinstance(n, ast.Import | ast.ImportFrom) and n.names[0].name == "nothing"))
    return "\n".join(map(ast.unparse, kept))


def meaning_of(*modules: str) -> str:
    """Hash of what library modules compute, and of all that they import: for caches that must know what made them.

    Args:
        modules: dotted names, e.g. `cai_em.sample.sampling`.

    Raises:
        CodeError: there is no such module.
    """
    return _hash("\n".join(f"import {name}" for name in modules), library_folder(), "a cache's key")
