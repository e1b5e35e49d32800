"""Pinned public files: a download cache in which every file is named by its commit and checked by its hash.

    path = fetch("owner/repo", commit, "results/file.json", sha256="9f86d0...")
    found = fetch_all([Pinned("owner/repo", commit, "a.json", sha256), ...])     # found.paths, found.missing

`https://raw.githubusercontent.com/<owner>/<repo>/<commit>/<path>` is stored as
`<cache>/github/<owner>/<repo>/<commit>/<path>`.
The cache is `CAI_EM_CACHE`, by default `cai-em` in the user's cache folder. Fetched text never enters the repository.

Three kinds of failure are kept apart: a file that cannot be had (`Unavailable`: offline, not found), which a caller may
go on without, loudly; a file that is not what was pinned (`HashMismatch`), which stops everything; and a request that
makes no sense (`ValueError`).
"""

from __future__ import annotations

import base64
import contextlib
import csv
import hashlib
import http.client
import io
import os
import random
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from threading import Event
from typing import Any

from tqdm import tqdm

from cai_em import __version__
from cai_em.records.files import atomic, file_hash

REPO, COMMIT = "ivan-gentile/arena-capstone", "74f08e6f506745bd1450119c4892b08f453c8c44"
"""The published study's repository, at the commit whose files `params/published_selection.csv` lists."""
REFERENCE_MODELS = ("qwen2.5-7b",)
"""Whose published responses the local judge learns from and is measured on."""
GITHUB_RAW = "https://raw.githubusercontent.com"
RETRY_STATUS = {408, 425, 429, 500, 502, 503, 504}
"""HTTP answers after which the same request may succeed."""
OFFLINE = "CAI_EM_OFFLINE"
"""Environment variable: set to anything, nothing is downloaded; what is not in the cache is `Unreachable`."""
MAX_WAIT_S = 60.0
_HEADERS = {"User-Agent": f"cai-em/{__version__}"}
LARGEST_MEMBER = 1 << 30
"""Bytes that one archive member may unpack to: a zip of a few kilobytes can claim to hold terabytes."""
_SALT_BYTES = 16
_PBKDF2_ITERATIONS = 100_000


class SourceError(RuntimeError):
    """A public file cannot be used. The message names file, address and remedy."""


class Unavailable(SourceError):
    """A file is neither in the cache nor to be had from the network. `what` is the message without the remedy."""

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(f"{what}. {remedy}" if remedy else what)
        self.what = what


class Unreachable(Unavailable):
    """The host does not answer: other files of it need not be tried."""


class HashMismatch(SourceError):
    """A file is not the one that was pinned."""


@dataclass(frozen=True)
class Pinned:
    """One file of a public GitHub repository at a commit; `sha256` (hexadecimal) where it is known."""

    repo: str
    commit: str
    path: str
    sha256: str | None = None

    def __post_init__(self) -> None:
        owner, _, name = self.repo.partition("/")
        if not owner or not name or not _plain(self.repo):
            raise ValueError(f"repository must be owner/name, not {self.repo!r}")
        if len(self.commit) != 40 or set(self.commit) - set("0123456789abcdef"):
            raise ValueError(f"{self.repo}: a commit is pinned by its 40 hexadecimal digits, not by {self.commit!r}")
        if not _plain(self.path):
            raise ValueError(f"{self.repo}: {self.path!r} is not a path inside a repository")

    @property
    def relative(self) -> str:
        """Place below both the cache's `github/` folder and the raw host."""
        return f"{self.repo}/{self.commit}/{self.path}"


def _plain(path: str) -> bool:
    """Whether a POSIX path is relative and stays where it is put."""
    parts = PurePosixPath(path).parts
    return bool(parts) and not path.startswith("/") and "\\" not in path and not {"..", "."} & set(path.split("/"))


def cache_root() -> Path:
    """The download cache: `CAI_EM_CACHE`, else `cai-em` in the user's cache folder."""
    if chosen := os.environ.get("CAI_EM_CACHE"):
        return Path(chosen).expanduser()
    try:
        import platformdirs
    except ImportError:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cai-em"
    return Path(platformdirs.user_cache_dir("cai-em", appauthor=False))


def cached(file: Pinned, cache: str | Path | None = None) -> Path:
    """Where a file lies in the cache, whether it is there or not."""
    return Path(cache or cache_root()) / "github" / file.relative


def at_hand(selection: str | Path, *, models: Iterable[str], cache: str | Path | None = None) -> bool:
    """Whether every published file that a selection lists for these models is in the cache; nothing is read of them.

    Args:
        selection: `params/published_selection.csv` (not validated here: `published.read_selection` does).
        models: whose files.
        cache: the cache's root; None: the usual one.
    """
    wanted = set(models)
    with Path(selection).open(newline="", encoding="utf-8") as file:
        paths = [row["path"] for row in csv.DictReader(file) if row["model"] in wanted]
    return all(cached(Pinned(REPO, COMMIT, path), cache).is_file() for path in paths)


# --- Fetching -----------------------------------------------------------------------------------------------------


def fetch(
    owner_repo: str,
    commit: str,
    path: str,
    sha256: str | None = None,
    *,
    cache: str | Path | None = None,
    base_url: str = GITHUB_RAW,
    retries: int = 3,
    wait_s: float = 1.0,
    timeout_s: float = 30.0,
) -> Path:
    """A file of a public repository, from the cache or else from the network.

    Args:
        owner_repo: `owner/name`.
        commit: 40 hexadecimal digits.
        path: inside the repository.
        sha256: what the file's bytes must hash to; a cached file is checked too.
        cache: the cache's root; `cache_root()` by default.
        base_url: where `<owner>/<repo>/<commit>/<path>` is served.
        retries: further attempts after a failed one.
        wait_s: pause before the first of them; it doubles, with jitter, and obeys `Retry-After`.
        timeout_s: of each connection and read.

    Returns:
        The file's path in the cache.

    Raises:
        HashMismatch: the cached or downloaded bytes are not the pinned ones.
        Unavailable: the file is not cached and cannot be downloaded.
    """
    file = Pinned(owner_repo, commit, path, sha256)
    target = cached(file, cache)
    if target.is_file():
        # Without a known hash there is nothing to compare with: reading the file would be work for nothing.
        if sha256:
            _check(file, target, file_hash(target), "delete the file to have it downloaded again")
        return target
    if os.environ.get(OFFLINE):
        raise Unreachable(f"{path}: not in the cache ({OFFLINE}={os.environ[OFFLINE]})", _remedy(target))
    url = _url(file, base_url)
    body = _download(file, url, target, retries, wait_s, timeout_s)
    try:
        with atomic(target) as part:
            part.write_bytes(body)
    except OSError as error:
        raise Unavailable(
            f"{path}: downloaded from {url}, but the cache cannot be written ({error.strerror}: {target.parent})",
            "Set CAI_EM_CACHE to a folder that can",
        ) from error
    return target


def obtainable(
    file: Pinned, *, cache: str | Path | None = None, base_url: str = GITHUB_RAW, timeout_s: float = 3.0
) -> bool:
    """Whether a file could be had now: it is cached, or its host has it (asked once; nothing is downloaded)."""
    if cached(file, cache).is_file():
        return True
    if os.environ.get(OFFLINE):
        return False
    request = urllib.request.Request(_url(file, base_url), headers=_HEADERS, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=timeout_s):
            return True
    except (OSError, http.client.HTTPException):
        return False


def _url(file: Pinned, base_url: str) -> str:
    return f"{base_url.rstrip('/')}/{urllib.parse.quote(file.relative)}"


def _check(file: Pinned, place: Path | str, found: str, remedy: str) -> None:
    if file.sha256 and found != file.sha256.lower():
        raise HashMismatch(
            f"{file.path}: not the pinned file: {place} has SHA-256 {found}, expected {file.sha256}; {remedy}"
        )


def _remedy(target: Path) -> str:
    return (
        f"Connect to the network and run again, or put the file at {target}, or set CAI_EM_CACHE to a cache that has it"
    )


def _download(file: Pinned, url: str, target: Path, retries: int, wait_s: float, timeout_s: float) -> bytes:
    """The bytes behind a URL, tried again after failures that may pass."""
    request = urllib.request.Request(url, headers=_HEADERS)
    pauses = random.Random(url)  # jitter: it spreads requests over time and touches no result
    remedy = _remedy(target)
    for attempt in range(retries + 1):
        asked = status = None
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as answer:
                body = answer.read()
            _check(file, url, hashlib.sha256(body).hexdigest(), "the transfer or the publication is damaged")
            return body
        except HashMismatch as error:
            cause: Exception = error
            if attempt == retries:
                raise
        except urllib.error.HTTPError as error:
            with error:
                cause, status, asked = error, error.code, error.headers.get("Retry-After")
            if status not in RETRY_STATUS:
                raise Unavailable(f"{file.path}: {url} answers {status} {error.reason}", remedy) from error
        except (OSError, http.client.HTTPException) as error:  # reading the answer raises bare SSL and socket errors
            cause = error
            if _no_such_host(error):
                break
        if attempt < retries:
            pause = float(asked) if asked and asked.isdigit() else wait_s * 2**attempt * (0.5 + pauses.random())
            time.sleep(min(pause, MAX_WAIT_S))
    tried = f"(attempts: {attempt + 1})"
    if status:  # the host answers, if not with this file: others may still be had
        reason = getattr(cause, "reason", "")
        raise Unavailable(f"{file.path}: {url} answers {status} {reason} {tried}", remedy) from cause
    reason = getattr(cause, "reason", None) or cause
    raise Unreachable(f"{file.path}: {url} could not be reached: {reason} {tried}", remedy) from cause


def _no_such_host(error: Exception) -> bool:
    """Whether the name server knows no such name: offline, as a rule, and no pause will change it."""
    reason = getattr(error, "reason", error)
    return isinstance(reason, socket.gaierror) and reason.errno == socket.EAI_NONAME


@dataclass(frozen=True)
class Fetched:
    """What `fetch_all` found: paths in the cache, and for each file that could not be had, why."""

    paths: dict[Pinned, Path]
    missing: dict[Pinned, str]


def fetch_all(files: Iterable[Pinned], *, workers: int = 8, progress: bool = True, **how: Any) -> Fetched:
    """Several files, downloaded side by side; one that cannot be had is reported and does not stop the rest.

    Args:
        files: what to fetch.
        workers: downloads at the same time.
        progress: show a bar.
        **how: further arguments of `fetch`.

    Raises:
        HashMismatch: a file is not the pinned one. This is never "missing": somebody should look.
    """
    files = list(dict.fromkeys(files))
    offline = Event()

    def one(file: Pinned) -> Path | str:
        if offline.is_set() and not cached(file, how.get("cache")).is_file():
            return f"{file.path}: not in the cache, and its host does not answer"
        try:
            return fetch(file.repo, file.commit, file.path, file.sha256, **how)
        except Unreachable as error:
            offline.set()
            return error.what
        except Unavailable as error:
            return error.what

    found: dict[Pinned, Path] = {}
    missing: dict[Pinned, str] = {}
    with (
        ThreadPoolExecutor(workers) as pool,
        contextlib.closing(
            tqdm(total=len(files), desc="public files", unit="file", mininterval=0.5, disable=not progress)
        ) as bar,
    ):
        for file, result in zip(files, pool.map(one, files)):
            if isinstance(result, str):
                missing[file] = result
            else:
                found[file] = result
            bar.update()
    return Fetched(found, missing)


# --- Encrypted archives -------------------------------------------------------------------------------------------


def read_encrypted_archive(path: str | Path, password: str, member: str) -> bytes:
    """One file out of an archive that is encrypted against crawlers, not against readers: its password is public.

    Format (facts of `clarifying-EM/model-organisms-for-EM`): 16 bytes of salt, then a Fernet token whose key is
    PBKDF2-HMAC-SHA256 of the password with 100,000 iterations; inside, a zip. Nothing is unpacked to disk.

    Args:
        path: the archive.
        password: its published password.
        member: name of a file in it: the whole name, or the last part where only one member has it.

    Raises:
        SourceError: the file is no such archive, the password is wrong, or the member is missing, ambiguous, too
            large or has a name that points outside the archive.
    """
    from cryptography.fernet import Fernet, InvalidToken
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.pbkdf2 import PBKDF2HMAC

    path = Path(path)
    data = path.read_bytes()
    salt, token = data[:_SALT_BYTES], data[_SALT_BYTES:]
    key = PBKDF2HMAC(algorithm=SHA256(), length=32, salt=salt, iterations=_PBKDF2_ITERATIONS).derive(password.encode())
    try:
        content = Fernet(base64.urlsafe_b64encode(key)).decrypt(token)
    except InvalidToken as error:
        raise SourceError(f"{path}: the password is wrong, or the file is not a salted Fernet archive") from error
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            info = _member(archive, member, path)
            return archive.read(info)
    except zipfile.BadZipFile as error:
        raise SourceError(f"{path}: what it decrypts to is not a sound zip file ({error})") from error


def _member(archive: zipfile.ZipFile, member: str, path: Path) -> zipfile.ZipInfo:
    entries = [e for e in archive.infolist() if not e.is_dir()]
    found = [e for e in entries if e.filename == member]
    found = found or [e for e in entries if PurePosixPath(e.filename).name == member]
    if len(found) != 1:
        what = "no file" if not found else f"{len(found)} files called"
        raise SourceError(f"{path}: {what} {member!r} (it has: {', '.join(sorted(e.filename for e in entries))})")
    (entry,) = found
    if not _plain(entry.filename):
        raise SourceError(f"{path}: member name {entry.filename!r} points outside the archive: refused")
    if entry.file_size > LARGEST_MEMBER:
        raise SourceError(f"{path}: {entry.filename} unpacks to {entry.file_size:,} bytes: refused")
    return entry
