"""The paper's check and rendering: prose and generated half put together, by Quarto or as a preview without it.

The prose (`paper/`) belongs to the repository, the generated half (`cai_em.report.paper`) to a run:
`results/<profile>/11_report/paper/`. `check` finds typed digits, unknown or unused variables, references and citations
that do not resolve, and results newer than what was generated. `build` puts a profile's half beside the prose, so that
`quarto render paper/` shows it too, and renders the page into the profile's results; the tables that the numbers link
to go with it.

    python -m cai_em.report.render check PROFILE          python -m cai_em.report.render build PROFILE OUT.html
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pypandoc
import yaml

from cai_em.records import files as records_files
from cai_em.records.files import MissingFile
from cai_em.report.markdown import GENERATED, TABLES_FOLDER
from cai_em.report.paper import SOURCES_LISTING, VARIABLES
from cai_em.study import entries, loading
from cai_em.study import study as study_study

VAR = re.compile(r"\{\{<\s*var\s+([A-Za-z0-9_.\-]+)\s*>\}\}")
INCLUDE = re.compile(r"\{\{<\s*include\s+(\S+)\s*>\}\}")
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", flags=re.S | re.M)
CROSSREF = ("fig", "tbl", "sec", "eq", "lst")
ALLOWED_DIGITS = re.compile(r"\bH[1-9]\b")
"""Digits that are names: hypotheses."""


class PaperError(RuntimeError):
    """The paper cannot be rendered; the message says why."""


def generated_of(study: study_study.Study) -> Path:
    """Where a profile's generated half lies."""
    return study.stage_dir("11_report") / "paper"


def read_listing(generated: Path) -> dict[str, Any]:
    """What a generated half says of itself: profile, hashes of what was read and written, numbers.

    Raises:
        PaperError: there is none.
    """
    path = Path(generated) / GENERATED / SOURCES_LISTING
    if not path.is_file():
        raise PaperError(f"{path} does not exist: run ./run_all.sh first")
    return json.loads(path.read_text(encoding="utf-8"))


# --- The check ----------------------------------------------------------------------------------------------------


def prose_files(paper: Path) -> list[Path]:
    """The hand-written sources."""
    return sorted(paper.glob("*.qmd"))


def _blank(match: re.Match[str]) -> str:
    """Same number of lines, no text: positions stay right."""
    return re.sub(r"[^\n]", " ", match[0])


def _without_code(text: str) -> str:
    """Text without front matter, comments and code."""
    text = re.sub(r"\A---\n.*?\n---\n", _blank, text, flags=re.S)
    return CODE.sub(_blank, re.sub(r"<!--.*?-->", _blank, text, flags=re.S))


NOT_TYPED = (
    r"<!--.*?-->",
    r"\{\{<.*?>\}\}",
    r"\]\([^)\n]*\)",  # the target of a link
    r"\{#[\w\-]+|(?<=[ .])#[\w\-]+(?=[ }])",  # an identifier
    r"(?<!\w)-?@[A-Za-z][\w:.\-]*",  # a citation or reference
    r"https?://\S+",
)
"""What may hold digits in a source: names that never reach the page as text."""


def _typed_digits(path: Path, text: str) -> list[str]:
    """Digits in prose, code spans, attributes and front matter, all of which a reader may take for results."""
    for pattern in NOT_TYPED:
        text = re.sub(pattern, _blank, text, flags=re.S if pattern.startswith("<!--") else 0)
    text = ALLOWED_DIGITS.sub("", text)
    return [
        f"{path.name}:{n}: a typed number {m[0]!r}: use {{{{< var … >}}}} or an included table"
        for n, line in enumerate(text.splitlines(), 1)
        for m in re.finditer(r"[\w.,%]*\d[\w.,%]*", line)
    ]


def expand(
    paper: Path, path: Path, problems: list[str], generated: Path | None = None, seen: tuple[Path, ...] = ()
) -> str:
    """A source with its includes in place, as Quarto does it: as text, paths relative to `paper`.

    Args:
        paper: the folder of the prose.
        path: the source.
        problems: what is found wrong is added here.
        generated: the folder with `_generated/`; `paper` by default.
        seen: the sources that include this one.
    """
    lines = []
    for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        match = INCLUDE.search(line)
        if not match:
            lines.append(line)
            continue
        target = (generated or paper if match[1].startswith(f"{GENERATED}/") else paper) / match[1]
        if line.strip() != match[0]:
            problems.append(f"{path.name}:{n}: an include must stand alone on its line: {line.strip()!r}")
        elif target in seen:
            problems.append(f"{path.name}:{n}: {match[1]} includes itself")
        elif not target.is_file():
            problems.append(f"{path.name}:{n}: included file {match[1]} does not exist: run ./run_all.sh first")
        else:
            lines += ["", expand(paper, target, problems, generated, (*seen, target)), ""]
    return "\n".join(lines)


def check_paper(paper: Path, generated: Path | None = None, main: str = "index.qmd") -> list[str]:
    """Everything that would make the paper wrong, one line each; empty when it is sound.

    Quarto only warns of references that do not resolve, so they are errors here.

    Args:
        paper: the folder of the prose.
        generated: the folder with `_generated/` and `_variables.yml`; `paper` by default.
        main: the source that includes the others.
    """
    paper = Path(paper)
    generated = Path(generated or paper)
    problems: list[str] = []
    whole = expand(paper, paper / main, problems, generated)
    for path in prose_files(paper):
        text = path.read_text(encoding="utf-8")
        problems += _typed_digits(path, text)
        problems += [
            f"{path.name}: {m[0]} in code would show its markup" for c in CODE.findall(text) for m in VAR.finditer(c)
        ]
    problems += _check_variables(paper, generated)
    problems += _check_references(paper, generated, _without_code(whole))
    problems += _check_stale(paper, generated)
    included = {m for path in prose_files(paper) for m in INCLUDE.findall(path.read_text(encoding="utf-8"))}
    problems += [f"{p.name}: no source includes it" for p in prose_files(paper) if p.name not in {main, *included}]
    blocks = sorted(p.relative_to(generated).as_posix() for p in (generated / GENERATED).glob("*.md"))
    problems += [f"{name}: no source includes it" for name in blocks if name not in included]
    return problems


def _check_variables(paper: Path, generated: Path) -> list[str]:
    file = generated / VARIABLES
    if not file.is_file():
        return [f"{VARIABLES} does not exist: run ./run_all.sh first"]
    flat: dict[str, Any] = {}

    def walk(node: Mapping[str, Any], prefix: str) -> None:
        for key, value in node.items():
            if isinstance(value, Mapping):
                walk(value, f"{prefix}{key}.")
            else:
                flat[f"{prefix}{key}"] = value

    walk(yaml.safe_load(file.read_text(encoding="utf-8")) or {}, "")
    problems, used = [], set()
    for path in prose_files(paper):
        for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            for name in VAR.findall(line):
                used.add(name)
                if name not in flat:
                    problems.append(f"{path.name}:{n}: variable {name} is not in {VARIABLES}")
    listing = generated / GENERATED / SOURCES_LISTING
    written = set(json.loads(listing.read_text(encoding="utf-8"))["used"]) if listing.is_file() else set()
    problems += [f"{VARIABLES}: {name} is used nowhere" for name in sorted(set(flat) - used - written)]
    return problems


def _check_references(paper: Path, generated: Path, text: str) -> list[str]:
    problems = []
    labels = re.findall(rf"\{{#((?:{'|'.join(CROSSREF)})-[\w\-]+)", text)
    anchors = set(re.findall(r"\{[^}]*#([\w\-]+)", text))
    problems += [
        f"label {label} is defined {labels.count(label)} times"
        for label in sorted(set(labels))
        if labels.count(label) > 1
    ]
    bibliography = (paper / "references.bib").read_text(encoding="utf-8")
    keys = re.findall(r"^@\w+\{([^,\s]+),", bibliography, flags=re.M)
    cited = set()
    for name in re.findall(r"(?<![\w\\])@([A-Za-z]\w*(?:[:.\-]\w+)*)", re.sub(r"\{\{<.*?>\}\}", "", text)):
        if name.split("-")[0] in CROSSREF and "-" in name:
            if name not in labels:
                problems.append(f"reference @{name} has no target")
        elif name not in keys:
            problems.append(f"citation @{name} is not in references.bib")
        else:
            cited.add(name)
    problems += [f"references.bib: {key} is cited nowhere" for key in keys if key not in cited]
    problems += [f"references.bib: {key} is given twice" for key in sorted(set(keys)) if keys.count(key) > 1]
    for target in sorted(set(re.findall(r"\]\(#([\w\-]+)\)", text))):
        if target not in anchors:
            problems.append(f"link to #{target} has no target")
    files = {("image", name) for name in re.findall(r"!\[[^\]]*\]\(([^)\s]+)", text)}
    files |= {("linked file", name) for name in re.findall(r"(?<!!)\[[^\]]*\]\(((?!#|https?:)[^)\s]+)\)", text)}
    for what, name in files:
        place = generated if name.startswith(f"{GENERATED}/") else paper
        if not (place / name).is_file():
            problems.append(f"{what} {name} does not exist")
    return sorted(set(problems))


def _check_stale(paper: Path, generated: Path) -> list[str]:
    try:
        listing = read_listing(generated)
    except PaperError as error:
        return [str(error)]
    problems = []
    for base, files, made in (
        (paper.resolve().parent, listing["inputs"], "was made from {}, which is gone"),
        (generated, listing["written"], "lacks {}"),
    ):
        for name, wanted in files.items():
            path = base / name
            if not path.is_file():
                problems.append(f"{GENERATED}/ {made.format(name)}")
            elif records_files.file_hash(path) != wanted:
                problems.append(f"{GENERATED}/ is stale: {name} has changed since")
    return problems


# --- The preview --------------------------------------------------------------------------------------------------


def variables(generated: Path) -> dict[str, Any]:
    """The nested mapping of `_variables.yml`."""
    return yaml.safe_load((generated / VARIABLES).read_text(encoding="utf-8")) or {}


def substitute(text: str, values: Mapping[str, Any]) -> str:
    """Text with `{{< var … >}}` replaced, outside code.

    Raises:
        KeyError: a variable that is not there.
    """

    def look_up(match: re.Match[str]) -> str:
        node: Any = values
        for part in match[1].split("."):
            node = node[part]
        return str(node)

    def pieces() -> Iterator[str]:
        end = 0
        for code in CODE.finditer(text):
            yield VAR.sub(look_up, text[end : code.start()])
            yield code[0]
            end = code.end()
        yield VAR.sub(look_up, text[end:])

    return "".join(pieces())


def preview(paper: Path, out: Path, generated: Path | None = None, *, why: str = "", main: str = "index.qmd") -> Path:
    """Render the paper without Quarto, as a preview: one self-contained HTML page, or Typst source for a PDF.

    Includes and variables are put in place as Quarto would; pandoc with citeproc and `_preview/filter.lua` does
    numbering, cross-references and callouts.

    Args:
        paper: the folder of the prose.
        out: `.html` or `.typ`.
        generated: the folder with `_generated/` and `_variables.yml`; `paper` by default.
        why: what the page says of why it is only a preview.
        main: the source that includes the others.

    Raises:
        PaperError: an include, a variable, a reference or a citation does not resolve.
    """
    paper, out = Path(paper).resolve(), Path(out).resolve()
    generated = Path(generated or paper).resolve()
    problems: list[str] = []
    text = expand(paper, paper / main, problems, generated)
    if problems:
        raise PaperError("\n".join(problems))
    try:
        text = substitute(text, variables(generated))
    except KeyError as error:
        raise PaperError(f"variable {error} is not in {VARIABLES}: run ./run_all.sh first") from error
    config = yaml.safe_load((paper / "_quarto.yml").read_text(encoding="utf-8"))
    command = [pypandoc.get_pandoc_path(), "--from", "markdown", "--standalone",
               "--number-sections", "--mathml",
               "--lua-filter", str(paper / "_preview" / "filter.lua"), "--citeproc",
               "--bibliography", str(paper / config["bibliography"]), "--metadata", "link-citations=true",
               "--metadata", f"date={date.today():%Y-%m-%d}", "--metadata", f"why-preview={why}",
               "--resource-path", f"{generated}{os.pathsep}{paper}"]  # fmt: skip
    if out.suffix == ".html":
        command += ["--to", "html5", "--toc", "--toc-depth=2", "--embed-resources", "--section-divs",
                    "--css", str(paper / "_preview" / "preview.css"), "--metadata", "lang=en"]  # fmt: skip
    else:
        command += ["--to", "typst"]
        for extra in config["format"]["typst"].get("include-in-header", []):
            command += ["--variable", f"header-includes={extra['text']}"]
    with records_files.atomic(out) as part:
        command += ["--output", str(part)]
        done = subprocess.run(command, input=text, text=True, capture_output=True, cwd=generated, check=False)
        if done.returncode or "[WARNING]" in done.stderr or "unresolved" in done.stderr:
            raise PaperError(f"pandoc: {done.stderr.strip() or 'failed'}")
    return out


# --- Building -----------------------------------------------------------------------------------------------------


def _replace_folder(source: Path, target: Path) -> None:
    """A copy of a folder in the place of another; the old one stays until the new one is whole."""
    with records_files.atomic_folder(target) as new:
        shutil.copytree(source, new, dirs_exist_ok=True)


def _replace_file(source: Path, target: Path) -> None:
    """A copy of a file in the place of another."""
    with records_files.atomic(target) as new:
        shutil.copyfile(source, new)


def install(generated: Path, paper: Path) -> None:
    """Put a run's generated half beside the prose, in the place of another run's."""
    _replace_folder(generated / GENERATED, paper / GENERATED)
    _replace_file(generated / VARIABLES, paper / VARIABLES)


def build(paper: Path, generated: Path, out: Path, profile: str) -> str:
    """Check the paper and render a profile's page: by Quarto where it is installed, else as the built-in preview.

    A Quarto that fails is no reason to have no page: the preview takes its place, and says so on the page and on
    standard error.

    Args:
        paper: the folder of the prose.
        generated: the profile's generated half.
        out: where the HTML page goes; Quarto's PDF and the tables that both link to go beside it.
        profile: whose page it is to be.

    Returns:
        What was made, in words.

    Raises:
        PaperError: the generated half is another profile's, the check found problems, or the rendering failed.
    """
    paper, generated, out = Path(paper), Path(generated), Path(out)
    whose = read_listing(generated)["profile"]
    if whose != profile:
        raise PaperError(
            f"{generated} holds the numbers of profile {whose!r}, not {profile!r}: run ./run_all.sh {profile}"
        )
    problems = check_paper(paper, generated)
    if problems:
        raise PaperError("the paper is not sound:\n" + "\n".join(problems))
    install(generated, paper)
    for old in ("index.html", "index.pdf"):
        out.with_name(old).unlink(missing_ok=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    (out.parent / GENERATED).mkdir(exist_ok=True)
    _replace_folder(generated / TABLES_FOLDER, out.parent / TABLES_FOLDER)
    quarto = shutil.which("quarto")
    if quarto is None:
        preview(paper, out, generated)
        return f"{out}: a preview by pandoc; with Quarto installed, `quarto render {paper}` makes the paper itself"
    failed = _quarto(quarto, paper, generated, out, profile)
    if not failed:
        return f"{out}: rendered by Quarto"
    print(f"WARNING: {failed}\nThe page is a preview by pandoc instead.", file=sys.stderr)
    preview(paper, out, generated, why="Quarto is installed but failed; its message is in logs/paper.log.")
    return f"{out}: a preview by pandoc, because Quarto failed"


def _quarto(quarto: str, paper: Path, generated: Path, out: Path, profile: str) -> str:
    """Render with Quarto and take page and PDF along; returns what went wrong, or nothing."""
    pages = [paper / "index.html", paper / "index.pdf"]
    for page in pages:
        page.unlink(missing_ok=True)
    environment = {**os.environ, "CAI_EM_PROFILE": profile, "CAI_EM_RESULTS": str(generated.resolve().parents[2])}
    done = subprocess.run([quarto, "render", str(paper)], capture_output=True, text=True, check=False, env=environment)
    said = f"{done.stdout.strip()}\n{done.stderr.strip()}".strip()
    if done.returncode:
        return f"quarto render {paper} failed:\n{said}"
    lacking = [page.name for page in pages if not page.is_file()]
    if lacking:
        return f"quarto render {paper} wrote no {' and no '.join(lacking)}:\n{said}"
    for page in pages:
        _replace_file(page, out if page.suffix == ".html" else out.with_name(page.name))
    return ""


def main(arguments: Sequence[str]) -> int:
    """Command line: `check PROFILE` or `build PROFILE OUT`."""
    paper = records_files.root() / "paper"
    try:
        match arguments:
            case ["check", profile]:
                problems = check_paper(paper, generated_of(loading.load(profile)))
                print("\n".join(problems) or f"{paper} with the numbers of {profile}: sound")
                return int(bool(problems))
            case ["build", profile, out]:
                study = loading.load(profile)
                print(build(paper, generated_of(study), Path(out), study.name))
                return 0
            case _:
                print(__doc__, file=sys.stderr)
                return 2
    except (PaperError, entries.ParamsError, MissingFile) as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
