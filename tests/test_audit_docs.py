"""docs/audit.md says what happens: its examples are made again, and what it quotes is what is printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from cai_em import audit
from cai_em import study as studies
from cai_em.records.files import root
from cai_em.study.audited import AuditSpec

from tests import audit_files as made

DOC = (root() / "docs" / "audit.md").read_text(encoding="utf-8")


def quoted(name: str) -> list[str]:
    """The lines of the block that follows the mention of an example."""
    after = DOC[DOC.index(f"example {name}`") :]
    block = re.search(r"\n```\n(.*?)\n```\n", after, re.DOTALL)
    assert block is not None
    return [line for line in block[1].splitlines() if line.strip() and line != "..."]


@pytest.mark.parametrize(("name", "open_"), [("runs", 0), ("logs", 0), ("records", 1)])
def test_what_the_page_quotes_is_what_is_printed(name: str, open_: int, tmp_path: Path) -> None:
    known = studies.load("published")
    made.example(name, tmp_path / name)
    found = audit.draft([tmp_path / name], personas=known.personas, datasets=known.datasets)
    assert len(found.spec.unknown) == open_
    printed = audit.understood(found, found.assemble()).splitlines()
    assert [line for line in quoted(name) if line not in printed] == []


def test_the_pages_audit_yaml_is_one() -> None:
    block = re.search(r"```yaml\n(.*?)\n```", DOC, re.DOTALL)
    assert block is not None
    spec = AuditSpec.model_validate(yaml.safe_load(block[1]))
    assert spec.personas["baseline"].found_as == ["none", ""]
    assert spec.files[0].patterns == ["{model}_{dataset}_{persona}_s{seed}.csv"]


def test_every_finding_has_words_and_every_rule_a_row() -> None:
    assert [rule.label for rule in audit.EM_RULES if rule.label.lower() not in DOC.lower()] == []


def test_nothing_is_left_to_fill_in() -> None:
    assert not re.search(r"\{[A-Z0-9]+\}", DOC)
