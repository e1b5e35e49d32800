"""The judge's memory: every answer that was paid for, in one SQLite file.

Content-addressed: the key of a call is the SHA-256 of all that decides its answer (the request's body, which holds
model, parameters and the rendered prompt with question and response; the prompt's version; the repetition). The
endpoint is not part of it: the same model behind another address is the same judge. Each answer is committed by itself
as soon as it arrives, so a killed process loses only what was still on its way. Answers are kept raw: a better parser
never costs a call.

Several processes may share the file (WAL mode). Where two paid for the same call at the same moment, the first answer
stays and both read it. WAL needs a local file system: give jobs on different hosts a cache each. A power cut may lose
the last moment's answers (`synchronous=NORMAL`), never the file.

No API key ever reaches this module.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from cai_em.judge_parse import Answer

_FORMAT = 1
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
    status TEXT NOT NULL, calls INTEGER NOT NULL, at REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS batch_calls (
    tag TEXT NOT NULL, key TEXT NOT NULL, PRIMARY KEY (tag, key)
) WITHOUT ROWID;
"""


class CacheError(RuntimeError):
    """The cache file cannot be opened or written. The message names the file and what to do."""


@dataclass(frozen=True)
class Spent:
    """Calls, tokens and US dollars that a judge model has cost, over all runs that shared the cache."""

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
    content = {"format": _FORMAT, "body": body, "prompt_version": prompt_version, "repeat": repeat}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


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
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            found = self._db.execute("PRAGMA user_version").fetchone()[0]
            if found == 0:
                self._db.executescript(f"BEGIN IMMEDIATE;{_SCHEMA}PRAGMA user_version={_FORMAT};COMMIT;")
            elif found != _FORMAT:
                raise CacheError(f"{self.path}: judge cache of format {found}, this code reads {_FORMAT}; move it away")
        except (OSError, sqlite3.Error) as error:
            raise CacheError(
                f"{self.path}: judge cache cannot be opened: {error}. Free space on its disk, wait for the "
                "process that holds it, or, if the file is damaged, move it away"
            ) from error

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
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise CacheError(
                f"{self.path}: judge cache cannot be written: {error}. "
                "Everything committed before is kept; free space or wait for the other process, then run again"
            ) from error

    # --- Answers ---

    def get(self, keys: Iterable[str]) -> dict[str, Answer]:
        """The answers that are known, by key."""
        keys, found = list(keys), {}
        for start in range(0, len(keys), 500):
            some = keys[start : start + 500]
            marks = ",".join("?" * len(some))
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
        """What a judge model has cost so far."""
        row = self._db.execute(
            "SELECT calls, prompt_tokens, completion_tokens, usd FROM spent WHERE model = ?", (model,)
        ).fetchone()
        return Spent(*row) if row else Spent()

    def __len__(self) -> int:
        return self._db.execute("SELECT count(*) FROM calls").fetchone()[0]

    # --- Batches ---

    def open_batch(self, tag: str, model: str, endpoint: str, keys: list[str]) -> None:
        """Note, before it is handed over, that a batch with these calls is about to be."""
        with self._transaction() as db:
            db.execute(
                "INSERT INTO batches VALUES (?,NULL,?,?,'submitting',?,?)",
                (tag, model, endpoint, len(keys), time.time()),
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
        rows = self._db.execute(
            "SELECT tag, id, status, calls, at FROM batches WHERE model = ? AND endpoint = ? ORDER BY at",
            (model, endpoint),
        )
        return [Batch(*row) for row in rows]

    def batch_keys(self, tag: str) -> set[str]:
        """The calls of a batch."""
        return {key for (key,) in self._db.execute("SELECT key FROM batch_calls WHERE tag = ?", (tag,))}


def _read_answer(text: str) -> Answer:
    data = json.loads(text)
    data["tokens"] = tuple(data["tokens"])
    data["top"] = tuple((token, logprob) for token, logprob in data["top"])
    return Answer(**data)
