"""Stops a process of a run at a chosen instant, to be killed there: Python imports this module where it is on its path.

The kill tests (`tests/killing.py`) put this folder on PYTHONPATH and name a folder in `CAI_EM_STALL`; the file `aim` in
it says where to stop. Chance would need thousands of kills to hit instants that last microseconds:

    adapter window   the new adapter is half on disk and about to take its name (an old one has left it)
    adapter placed   the new adapter has taken its name, its manifest is not written
    table half       half of a table is on disk, about to take its name
    cache open       a transaction of the judge's cache is open, with an answer in it

The code of the project runs as it is: only `os.replace`, `os.rename` and `sqlite3.connect` are listened to. The first
process that comes to the place makes the file `stalled` and waits there, for ever.
"""

import contextlib
import os
import time


def _listen(folder: str) -> None:
    import sqlite3

    def aim() -> str:
        with contextlib.suppress(OSError), open(f"{folder}/aim", encoding="utf-8") as file:
            return file.read().strip()
        return ""

    def stall(path: str | None = None) -> None:
        try:
            os.close(os.open(f"{folder}/stalled", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return  # another process is stalled already
        if path:
            os.truncate(path, os.path.getsize(path) // 2)
        while True:
            time.sleep(60)

    def watched(move):
        def moved(source, target, **more):
            name, wanted = os.path.basename(os.fspath(target)), aim()
            weights = os.path.join(os.fspath(source), "adapter_model.safetensors")
            adapter = wanted.startswith("adapter") and name == "adapter" and os.path.isfile(weights)
            if adapter and wanted == "adapter window":
                stall(weights)
            if wanted == "table half" and name.endswith(".parquet"):
                stall(os.fspath(source))
            move(source, target, **more)
            if adapter and wanted == "adapter placed":
                stall()

        return moved

    class Connection(sqlite3.Connection):
        calls = 0

        def execute(self, sql: str, *more: object) -> sqlite3.Cursor:
            if sql.startswith("INSERT"):
                self.calls += 1
            # Not the first answer: kills must find some that are kept.
            if sql == "COMMIT" and self.calls > 5 and aim() == "cache open":
                stall()
            return super().execute(sql, *more)

    plain = sqlite3.connect

    def connect(database, *more, **how):
        if "judge_cache" in str(database):
            how.setdefault("factory", Connection)
        return plain(database, *more, **how)

    os.replace, os.rename, sqlite3.connect = watched(os.replace), watched(os.rename), connect


if os.environ.get("CAI_EM_STALL"):
    _listen(os.environ["CAI_EM_STALL"])
