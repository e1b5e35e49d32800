"""What every test may ask for: the fetched data's cache, paths of the repository."""

import os
import shutil
from pathlib import Path

import pytest

from tests.factories import TINY

ROOT = Path(__file__).resolve().parents[1]

LONGEST_FIRST = (
    "workflow",
    "finetune_job",
    "judge",
    "train",
    "published",
    "slurm",
    "kills",
    "sample",
    "check",
    "judge_local",
)
"""Files that take a minute or more: begun first, so that no worker is left alone with one at the end. A file's tests
share what its first one made, and stay on one worker (`--dist loadfile`)."""


def pytest_collection_modifyitems(items):
    """Long files first, the rest as collected."""
    rank = {f"test_{name}.py": place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's top folder."""
    return ROOT


@pytest.fixture
def folder(root, tmp_path):
    """A copy of params/ that a test may spoil."""
    from cai_em.study import loading

    shutil.copytree(root / "params", tmp_path / "params")
    loading._registries.cache_clear()
    yield tmp_path / "params"
    loading._registries.cache_clear()


@pytest.fixture(scope="session")
def fetched_cache() -> Path:
    """The cache of fetched public data (`CAI_EM_CACHE`, else ../shared/cache); skips where there is none."""
    places = [os.environ.get("CAI_EM_CACHE"), ROOT.parent / "shared" / "cache"]
    for place in places:
        if place and (Path(place) / "github" / "ivan-gentile").is_dir():
            return Path(place).resolve()
    pytest.skip("fetched public data not present: set CAI_EM_CACHE to a cache that holds it")


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """Where the tiny model is made, once."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def tokenizer(cache):
    """The tiny model's, not to be changed."""
    from cai_em.model.load import load_tokenizer

    return load_tokenizer(TINY, cache)


@pytest.fixture
def model(cache):
    """The tiny model, to do anything to."""
    from cai_em.model.load import load_model

    return load_model(TINY, cache_dir=cache)
