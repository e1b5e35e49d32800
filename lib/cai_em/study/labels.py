"""What things are called, and in which order they stand: personas, data sets and models, from `params/`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

ROLE_SIGN = {"em": "●", "benign_control": "■", "regularisation": "▲", "arm": "✚", "none": "◆"}
"""The markers of a data set's roles (`cai_em.report.style.ROLE_MARKER`) as text."""


class Labelled(Protocol):
    """An entry with a key, a label and a place in the order."""

    key: str
    label: str
    order: int


@dataclass(frozen=True)
class Labels:
    """Labels, roles and order of the study's personas, data sets and models.

    Args:
        personas: entries with `key, label, order` (`cai_em.study.entries.Persona`).
        datasets: entries with `key, label, order, role` (`cai_em.study.entries.Dataset`).
        models: entries with `key, label, order`.

    A key that no entry names (a persona of somebody else's data) is shown under its own name, last.
    """

    personas: Sequence[Any]
    datasets: Sequence[Any]
    models: Sequence[Labelled] = ()
    _personas: dict[str, Any] = field(init=False, repr=False)
    _datasets: dict[str, Any] = field(init=False, repr=False)
    _models: dict[str, Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("personas", "datasets", "models"):
            object.__setattr__(self, f"_{name}", {entry.key: entry for entry in getattr(self, name)})

    def persona(self, key: str) -> str:
        """A persona's label."""
        return self._personas[key].label if key in self._personas else key

    def dataset(self, key: str) -> str:
        """A data set's label."""
        return self._datasets[key].label if key in self._datasets else key

    def model(self, key: str) -> str:
        """A model's label."""
        return self._models[key].label if key in self._models else key

    def role(self, dataset: str) -> str:
        """A data set's role; one that nobody declared counts as a control: it must not carry a verdict."""
        return self._datasets[dataset].role if dataset in self._datasets else "benign_control"

    def signed(self, dataset: str) -> str:
        """A data set's label with the sign of its role: colour alone would be lost in greyscale."""
        return f"{self.dataset(dataset)} {ROLE_SIGN[self.role(dataset)]}"

    def sort_personas(self, keys: Iterable[str]) -> list[str]:
        """Distinct persona keys in the study's order, unknown ones last, by name."""
        return self._sorted(keys, self._personas)

    def sort_datasets(self, keys: Iterable[str]) -> list[str]:
        """Distinct data set keys in the study's order."""
        return self._sorted(keys, self._datasets)

    def sort_models(self, keys: Iterable[str]) -> list[str]:
        """Distinct model keys in the study's order."""
        return self._sorted(keys, self._models)

    @staticmethod
    def _sorted(keys: Iterable[str], known: dict[str, Any]) -> list[str]:
        return sorted(set(keys), key=lambda k: (known[k].order if k in known else len(known) + 1_000, k))
