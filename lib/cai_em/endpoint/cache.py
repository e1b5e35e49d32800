"""The memory of what was paid for: every answer of a judge, or of a teacher, in one SQLite file.

Content-addressed: the key of a call is the SHA-256 of all that decides its answer (the request's body, which holds
model, parameters and the rendered prompt with question and response; the prompt's version; the repetition). The
endpoint is not part of it: the same model behind another address is the same judge. Each answer is committed by itself
as soon as it arrives, so a killed process loses only what was still on its way. Answers are kept raw: a better parser
never costs a call.

Several processes may share the file (WAL mode). Where two paid for the same call at the same moment, the first answer
stays and both read it. WAL needs memory that all readers share, so on a network file system (a cluster's, where jobs
of different hosts meet) SQLite's rollback journal takes its place: slower, and safe wherever files can be locked. With
WAL a power cut may lose the last moment's answers (`synchronous=NORMAL`), never the file.

No API key ever reaches this module.
"""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

_FORMAT = 2
_KEY_FORMAT = 1
"""Part of every key: as long as it stays, answers of older files are found."""
_MIGRATIONS = {1: "ALTER TABLE batches ADD COLUMN usd REAL NOT NULL DEFAULT 0;"}
_SCHEMA = """
CREATE TABLE IF NOT EXISTS calls (
    key TEXT PRIMARY KEY, model TEXT NOT NULL, answer TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, usd REAL NOT NULL,
    endpoint TEXT NOT NULL, via TEXT NOT NULL, at REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS spent (
    model TEXT PRIMARY KEY, calls INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL, usd REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS batches (
    tag TEXT PRIMARY KEY, id TEXT, model TEXT NOT NULL, endpoint TEXT NOT NULL,
    status TEXT NOT NULL, calls INTEGER NOT NULL, at REAL NOT NULL, usd REAL NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS batch_calls (
    tag TEXT NOT NULL, key TEXT NOT NULL, PRIMARY KEY (tag, key)
) WITHOUT ROWID;
"""


class JudgeError(RuntimeError):
    """Asking had to stop. What was answered before is in the cache; the message says what to do."""


class CacheError(JudgeError):
    """The cache file cannot be opened, read or written. The message names the file and what to do."""


@dataclass(frozen=True)
class Answer:
    """What a model returned for one call; this, not what is read from it, is what the cache keeps.

    Attributes:
        text: the generated text.
        finish_reason: as the server said, or None.
        model: the model that the server says answered.
        tokens: the first generated tokens, where log-probabilities were asked for.
        top: the first token's alternatives, [token, natural-log probability].
        prompt_tokens, completion_tokens: as the server counted them; None where it did not, or not sensibly.
    """

    text: str
    finish_reason: str | None = None
    model: str | None = None
    tokens: tuple[str, ...] = ()
    top: tuple[tuple[str, float], ...] = ()
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


@dataclass(frozen=True)
class Spent:
    """Calls, tokens and US dollars that a model has cost, over all runs that shared the cache."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    usd: float = 0.0


@dataclass(frozen=True)
class Batch:
    """A batch that was handed to a Batch API and not collected yet. `id` is None if the hand-over was interrupted."""

    tag: str
    id: str | None
    status: str
    calls: int
    at: float


def call_key(body: dict, prompt_version: str, repeat: int = 0) -> str:
    """The address of a call.

    Args:
        body: the request's JSON body: model, messages, temperature, max_tokens, log-probability settings, seed.
        prompt_version: the version that the prompt file names.
        repeat: which repetition of the same question this is; repetitions measure how far a judge agrees with itself.
    """
    content = {"format": _KEY_FORMAT, "body": body, "prompt_version": prompt_version, "repeat": repeat}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


NETWORK = re.compile(r"nfs\d?|lustre|gpfs|beegfs|ceph|cifs|smb\d?|smbfs|afs|panfs|orangefs|pvfs2|fuse\..*|9p|virtiofs")
"""File systems that several hosts may have mounted, as `/proc/mounts` calls them."""


def on_network(path: str | Path, mounts: str | Path = "/proc/mounts") -> bool:
    """Whether a file lies where other hosts may open it too; False where the system does not say (no Linux).

    Args:
        path: the file, which need not exist.
        mounts: the list of mounted file systems.
    """
    try:
        lines = Path(mounts).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    place = Path(path).resolve()
    found = [(Path(where.replace("\\040", " ")), kind) for _, where, kind, *_ in map(str.split, lines)]
    holding = [
        (len(where.parts), number, kind) for number, (where, kind) in enumerate(found) if place.is_relative_to(where)
    ]
    return bool(holding) and NETWORK.fullmatch(max(holding)[2]) is not None


class JudgeCache:
    """Open a cache file, making it if need be. Use as a context manager, in one thread."""

    def __init__(self, path: str | Path):
        """Open.

        Raises:
            CacheError: the file is not a cache, its folder cannot be written, or it is damaged.
        """
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # autocommit; transactions are opened by name where more than one statement belongs together
            self._db = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
            shared = on_network(self.path)
            self._db.execute(f"PRAGMA journal_mode={'DELETE' if shared else 'WAL'}")
            self._db.execute(f"PRAGMA synchronous={'FULL' if shared else 'NORMAL'}")
            found = self._db.execute("PRAGMA user_version").fetchone()[0]
            if found == 0:
                self._db.executescript(f"BEGIN IMMEDIATE;{_SCHEMA}PRAGMA user_version={_FORMAT};COMMIT;")
            elif found in _MIGRATIONS:
                self._migrate()
            elif found != _FORMAT:
                raise CacheError(
                    f"{self.path}: a cache of answers of format {found}, this code reads {_FORMAT}; move it away"
                )
        except (OSError, sqlite3.Error) as error:
            raise CacheError(
                f"{self.path}: the cache of answers cannot be opened: {error}. Free space on its disk, wait for the "
                "process that holds it, or, if the file is damaged, move it away"
            ) from error

    def _migrate(self) -> None:
        """Bring an older file to this format; another process may be about to do the same."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            while step := _MIGRATIONS.get(found := self._db.execute("PRAGMA user_version").fetchone()[0]):
                self._db.execute(step)
                self._db.execute(f"PRAGMA user_version={found + 1}")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def __enter__(self) -> JudgeCache:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; what was put is already on disk."""
        self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            yield self._db
            self._db.execute("COMMIT")
        except BaseException as error:
            if self._db.in_transaction:  # a full disk, for one, has ended it already
                self._db.execute("ROLLBACK")
            if not isinstance(error, sqlite3.Error):
                raise
            raise CacheError(
                f"{self.path}: the cache of answers cannot be written: {error}. "
                "Everything committed before is kept; free space or wait for the other process, then run again "
                "(if the file is damaged, move it away)"
            ) from error

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, ValueError, KeyError, TypeError) as error:
            raise CacheError(
                f"{self.path}: the cache of answers cannot be read; the file is probably damaged ({error}). Put a "
                f"backup in its place, save what can be saved (sqlite3 '{self.path}' .recover | sqlite3 saved.sqlite), "
                "or move it away: what it held is then asked, and paid for, again"
            ) from error

    # --- Answers ---

    def get(self, keys: Iterable[str]) -> dict[str, Answer]:
        """The answers that are known, by key.

        Raises:
            CacheError: the file is damaged.
        """
        keys, found = list(keys), {}
        for start in range(0, len(keys), 500):
            some = keys[start : start + 500]
            marks = ",".join("?" * len(some))
            with self._reading():
                for key, answer in self._db.execute(f"SELECT key, answer FROM calls WHERE key IN ({marks})", some):
                    found[key] = _read_answer(answer)
        return found

    def put(
        self,
        key: str,
        model: str,
        answer: Answer,
        usage: tuple[int, int, float],
        endpoint: str = "",
        via: str = "chat",
    ) -> Answer:
        """Keep an answer and count what it cost, in one transaction.

        Args:
            key: from `call_key`.
            model: the judge model that was asked for.
            answer: what it said.
            usage: prompt tokens, completion tokens, US dollars; counted as spent even where another process was first.
            endpoint: host that answered, for the record.
            via: `chat` or `batch`.

        Returns:
            The answer that the cache holds: this one, or the one that another process put first.
        """
        text = json.dumps(asdict(answer), ensure_ascii=True)
        with self._transaction() as db:
            db.execute(
                "INSERT OR IGNORE INTO calls VALUES (?,?,?,?,?,?,?,?,?)",
                (key, model, text, *usage, endpoint, via, time.time()),
            )
            self._count(db, model, 1, usage)
            kept = db.execute("SELECT answer FROM calls WHERE key = ?", (key,)).fetchone()[0]
        return _read_answer(kept)

    def lost(self, model: str, usage: tuple[int, int, float]) -> None:
        """Count a call that was probably billed and gave nothing that could be kept."""
        with self._transaction() as db:
            self._count(db, model, 1, usage)

    @staticmethod
    def _count(db: sqlite3.Connection, model: str, calls: int, usage: tuple[int, int, float]) -> None:
        db.execute(
            "INSERT INTO spent VALUES (?,?,?,?,?) ON CONFLICT(model) DO UPDATE SET calls = calls + excluded.calls, "
            "prompt_tokens = prompt_tokens + excluded.prompt_tokens, "
            "completion_tokens = completion_tokens + excluded.completion_tokens, usd = usd + excluded.usd",
            (model, calls, *usage),
        )

    def spent(self, model: str) -> Spent:
        """What a model has cost so far."""
        with self._reading():
            row = self._db.execute(
                "SELECT calls, prompt_tokens, completion_tokens, usd FROM spent WHERE model = ?", (model,)
            ).fetchone()
        return Spent(*row) if row else Spent()

    def charged(self, model: str) -> float:
        """US dollars that count against a model's cap: spent, and what the batches under way may cost at most."""
        with self._reading():
            pending = self._db.execute("SELECT total(usd) FROM batches WHERE model = ?", (model,)).fetchone()[0]
        return self.spent(model).usd + pending

    def __len__(self) -> int:
        with self._reading():
            return self._db.execute("SELECT count(*) FROM calls").fetchone()[0]

    # --- Batches ---

    def open_batch(self, tag: str, model: str, endpoint: str, keys: list[str], usd: float = 0.0) -> None:
        """Note, before it is handed over, that a batch with these calls, which may cost so much, is about to be."""
        with self._transaction() as db:
            db.execute(
                "INSERT INTO batches VALUES (?,NULL,?,?,'submitting',?,?,?)",
                (tag, model, endpoint, len(keys), time.time(), usd),
            )
            db.executemany("INSERT INTO batch_calls VALUES (?,?)", [(tag, key) for key in keys])

    def update_batch(self, tag: str, status: str, batch_id: str | None = None) -> None:
        """Note a batch's status, and its id once the server gave one."""
        with self._transaction() as db:
            db.execute("UPDATE batches SET status = ?, id = coalesce(?, id) WHERE tag = ?", (status, batch_id, tag))

    def close_batch(self, tag: str) -> None:
        """Forget a batch whose answers are collected, or that never reached the server."""
        with self._transaction() as db:
            db.execute("DELETE FROM batch_calls WHERE tag = ?", (tag,))
            db.execute("DELETE FROM batches WHERE tag = ?", (tag,))

    def open_batches(self, model: str, endpoint: str) -> list[Batch]:
        """Batches of a model at an endpoint that are not collected yet, oldest first."""
        with self._reading():
            rows = self._db.execute(
                "SELECT tag, id, status, calls, at FROM batches WHERE model = ? AND endpoint = ? ORDER BY at",
                (model, endpoint),
            ).fetchall()
        return [Batch(*row) for row in rows]

    def batch_keys(self, tag: str) -> set[str]:
        """The calls of a batch."""
        with self._reading():
            return {key for (key,) in self._db.execute("SELECT key FROM batch_calls WHERE tag = ?", (tag,))}


def _read_answer(text: str) -> Answer:
    data = json.loads(text)
    data["tokens"] = tuple(data["tokens"])
    data["top"] = tuple((token, logprob) for token, logprob in data["top"])
    return Answer(**data)
