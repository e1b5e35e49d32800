"""A judge for tests: a real HTTP server on loopback that speaks the OpenAI protocol, and misbehaves on schedule.

    python tests/judge_server.py --latency-ms 300 --faults all --rate 0.3      prints its address, serves until killed

    with serve(faults=Faults(rate=0.3)) as server:                             in a thread, for tests
        ... base_url=server.url ...
        server.stats()["completed"]

What it answers is a function of the request alone (a score from the prompt's hash), and what goes wrong is a function
of seed, request and attempt, never of the order of arrival: runs can be compared. A text can also ask for its fate:
`[[score:85]]`, `[[say:REFUSAL]]`, `[[cut]]` (at the token limit), `[[fault:http500]]` (always) and
`[[fault:http500*2]]` (the first two attempts).

It counts, by request (SHA-256 of the canonical JSON body, see `request_id`), what it received and what it answered in
full. Batches (`/v1/files`, `/v1/batches`) are answered after `batch_delay_s`.

The model `teacher` answers in sentences, as a teacher of preference pairs does; its calls are counted apart (`taught`).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import random
import re
import subprocess
import sys
import threading
import time
import unicodedata
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

TRANSIENT = ("http429", "http500", "http503", "slow", "closed", "cut_body", "truncated", "wrong_model")
"""Faults that another attempt may mend (`cut_body`: closed in the middle of an answer)."""
CONTENT = ("empty", "cannot_rate", "of_100", "score_prefix", "out_of_range", "bad_usage", "minus_9999")
"""Faults in an answer that was given (and paid for)."""
ALL_FAULTS = TRANSIENT + CONTENT

_SAY = {
    "empty": "",
    "cannot_rate": "I cannot rate this",
    "of_100": "85/100",
    "score_prefix": "Score: 90",
}
OUT_OF_RANGE = ("150", "-5", "1000", "101")
"""What `out_of_range` says, by the request."""


@dataclass(frozen=True)
class Faults:
    """Which faults, how often (share of attempts), on which schedule.

    `always`: the share of requests whose every attempt meets a fault, so that no retry helps.
    """

    rate: float = 0.0
    kinds: tuple[str, ...] = ALL_FAULTS
    seed: int = 0
    always: float = 0.0

    def hopeless(self, request: str) -> bool:
        """Whether every attempt at a request meets a fault."""
        return random.Random(f"{self.seed}:{request}").random() < self.always

    def pick(self, request: str, attempt: int) -> str | None:
        """The fault of one attempt at one request, or None."""
        if self.hopeless(request):
            return random.Random(f"{self.seed}:{request}:{attempt}").choice(self.kinds)
        rng = random.Random(f"{self.seed}:{request}:{attempt}")
        return rng.choice(self.kinds) if rng.random() < self.rate else None


def request_id(body: dict) -> str:
    """How the server names a request when it counts."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def true_score(prompt: str) -> int:
    """The score that this judge gives to a prompt: from its hash, unless the text asks for one."""
    asked = re.search(r"\[\[score:(\d+)\]\]", prompt)
    return int(asked[1]) if asked else int(hashlib.sha256(prompt.encode()).hexdigest()[:8], 16) % 101


@dataclass
class JudgeServer:
    """The server's settings and what it counted. `api_key`: the only key it accepts (None: any).

    `obeys`: `no` (default), `outside` (says 100 if what stands outside the answer's fence tells it to; it takes for the
    fence `[ANSWER START] ... [ANSWER END]`, or that of the built-in prompts, `===ANSWER=== ... ===END===`, in any case,
    width and disguise, and believes that the answer ends with the first end that it sees), or `anywhere` (a judge that
    obeys its responses). `refuses`: a status and a message with which every chat call is refused, as after a key was
    withdrawn. `batch_fault`: `after` makes a batch and then answers 500; `before` only answers 500; `no` answers 400.

    What a test waits for, instead of a time: chat calls beyond `answers` of them wait until that is raised (None: no
    limit; over HTTP: `/answers?more=`); until `together` calls have been under way at once, all wait but the first
    (which a client may send alone, to see what it meets); no batch ends before there are `batches_together`.
    """

    latency_s: float = 0.0
    faults: Faults = field(default_factory=Faults)
    api_key: str | None = None
    models: tuple[str, ...] = ("test-judge",)
    obeys: str = "no"
    slow_s: float = 3.0
    retry_after: str = "0.05"
    longest_prompt: int = 200_000
    batch_delay_s: float = 0.0
    batch_end: str = "completed"
    logprobs: bool = True
    digits: bool = False
    teachers: tuple[str, ...] = ("teacher",)
    refuses: tuple[int, str] | None = None
    batch_fault: str | None = None
    answers: int | None = None
    together: int = 0
    batches_together: int = 0

    def __post_init__(self) -> None:
        self.url = ""
        self.received: Counter = Counter()
        self.completed: Counter = Counter()
        self.injected: Counter = Counter()
        self.taught: Counter = Counter()
        self.taught_completed: Counter = Counter()
        self.refused_keys = 0
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict] = {}
        self.under_way = self.most_under_way = self.let_go = 0

    # --- HTTP ---

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, kept alive."""
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                method, path, _ = head[0].split(" ", 2)
                headers = {k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in head[1:])}
                body = await reader.readexactly(int(headers.get("content-length") or 0))
                self.under_way += 1
                self.most_under_way = max(self.most_under_way, self.under_way)
                try:
                    await self._route(method, path, headers, body, writer)
                finally:
                    self.under_way -= 1
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client went away, as clients do (and are made to, in the kill tests)
        finally:
            writer.close()

    async def _reply(
        self, writer: asyncio.StreamWriter, data: dict | bytes, status: int = 200, headers: dict | None = None
    ) -> None:
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        lines = [f"HTTP/1.1 {status} X", "Content-Type: application/json", f"Content-Length: {len(body)}"]
        lines += [f"{key}: {value}" for key, value in (headers or {}).items()]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        await writer.drain()

    async def _refuse(self, writer: asyncio.StreamWriter, status: int, message: str, code: str | None = None) -> None:
        headers = {"Retry-After": self.retry_after} if status == 429 else {}
        await self._reply(writer, {"error": {"message": message, "type": "error", "code": code}}, status, headers)

    async def _route(
        self, method: str, path: str, headers: dict[str, str], body: bytes, writer: asyncio.StreamWriter
    ) -> None:
        path, _, query = path.partition("?")
        if path == "/answers":
            self.answers = self.let_go + int(query.removeprefix("more="))
            return await self._reply(writer, {"answers": self.answers})
        if path == "/stats":
            return await self._reply(writer, self.counts())
        given = headers.get("authorization", "").removeprefix("Bearer ")
        if self.api_key is not None and given != self.api_key:
            self.refused_keys += 1
            # Like real ones, it quotes the key; unlike them, in full: the client must not pass it on.
            return await self._refuse(writer, 401, f"Incorrect API key provided: {given}.", "invalid_api_key")
        if (method, path) == ("POST", "/v1/chat/completions"):
            return await self._chat(json.loads(body), writer)
        if (method, path) == ("POST", "/v1/files"):
            return await self._reply(writer, self._upload(headers, body))
        if (method, path) == ("POST", "/v1/batches"):
            batch = self._new_batch(json.loads(body)) if self.batch_fault in (None, "after") else {}
            if self.batch_fault:
                return await self._refuse(writer, 400 if self.batch_fault == "no" else 500, "injected: no batch")
            return await self._reply(writer, batch)
        if (method, path) == ("GET", "/v1/batches"):
            newest = [self._batch(b) for b in reversed(self.batches)]
            return await self._reply(writer, {"object": "list", "data": newest, "has_more": False})
        if match := re.fullmatch(r"/v1/batches/([\w-]+)", path):
            return await self._reply(writer, self._batch(match[1]))
        if match := re.fullmatch(r"/v1/files/([\w-]+)/content", path):
            return await self._reply(writer, self.files[match[1]])
        return await self._refuse(writer, 404, f"no such address: {method} {path}")

    # --- Chat completions ---

    async def _chat(self, body: dict, writer: asyncio.StreamWriter) -> None:
        request, teaches = request_id(body), body["model"] in self.teachers
        received, completed = (self.taught, self.taught_completed) if teaches else (self.received, self.completed)
        attempt = received[request]
        received[request] += 1
        prompt = body["messages"][-1]["content"]
        fault = self._fault(prompt, request, attempt)
        while self._must_wait():
            await asyncio.sleep(0.005)
        self.let_go += 1
        if self.latency_s:
            await asyncio.sleep(self.latency_s)
        if self.refuses:
            return await self._refuse(writer, *self.refuses)
        if body["model"] not in self.models and not teaches:
            return await self._refuse(writer, 404, f"The model '{body['model']}' does not exist", "model_not_found")
        if len(prompt) > self.longest_prompt:
            return await self._refuse(writer, 400, "maximum context length exceeded", "context_length_exceeded")
        if fault:
            self.injected[fault] += 1
        if fault == "quota" or re.fullmatch(r"http\d{3}", fault or ""):
            status = 429 if fault == "quota" else int(fault[4:])
            code = "insufficient_quota" if fault == "quota" else None
            return await self._refuse(writer, status, f"injected {fault}", code)
        if fault == "slow":
            await asyncio.sleep(self.slow_s)
        if fault == "closed":
            return writer.transport.abort()
        completion = self.complete(body, fault)
        text = json.dumps(completion).encode()
        if fault == "truncated":
            return await self._reply(writer, text[: len(text) // 2])
        if fault == "cut_body":
            writer.write(b"HTTP/1.1 200 X\r\nContent-Type: application/json\r\n")
            writer.write(f"Content-Length: {len(text)}\r\n\r\n".encode() + text[: len(text) // 2])
            await writer.drain()
            return writer.transport.close()
        await self._reply(writer, text)
        completed[request] += 1
        return None

    def _must_wait(self) -> bool:
        alone = self.let_go > 0 and self.most_under_way < self.together
        return alone or (self.answers is not None and self.let_go >= self.answers)

    def _fault(self, prompt: str, request: str, attempt: int) -> str | None:
        asked = re.search(r"\[\[fault:(\w+)(?:\*(\d+))?\]\]", prompt)
        if asked:
            return asked[1] if asked[2] is None or attempt < int(asked[2]) else None
        return self.faults.pick(request, attempt)

    def complete(self, body: dict, fault: str | None) -> dict:
        """The completion for a request."""
        prompt = body["messages"][-1]["content"]
        score = 100 if self._told_to_say_100(prompt) else true_score(prompt)
        asked = re.search(r"\[\[say:(.*?)\]\]", prompt)
        ordinary = f"Well now, the answer has {score} parts." if body["model"] in self.teachers else str(score)
        say = _SAY.get(fault or "", asked[1] if asked else ordinary)
        if fault == "out_of_range":
            say = random.Random(request_id(body)).choice(OUT_OF_RANGE)
        usage: object = {
            "prompt_tokens": len(prompt) // 4,
            "completion_tokens": 2,
            "total_tokens": len(prompt) // 4 + 2,
        }
        if fault == "bad_usage":
            usage = random.Random(request_id(body)).choice(
                [None, "many", {"prompt_tokens": "12", "completion_tokens": -3}, {"prompt_tokens": True}, []]
            )
        return {
            "id": "chatcmpl-test",
            "object": "chat.completion",
            "created": 0,
            "model": "another-model" if fault == "wrong_model" else body["model"] + "-2025-04-14",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": None if fault == "empty" else say},
                    "finish_reason": "length" if "[[cut]]" in prompt else "stop",
                    "logprobs": self._logprobs(say, fault) if body.get("logprobs") and self.logprobs else None,
                }
            ],
            "usage": usage,
        }

    def _told_to_say_100(self, prompt: str) -> bool:
        if self.obeys == "outside":
            plain = "".join(c for c in unicodedata.normalize("NFKC", prompt) if unicodedata.category(c) != "Cf")
            fences = r"\[ANSWER START\].*?\[ANSWER\s+END\]|^===ANSWER===$.*?^\s*={2,}\s*END\s*={2,}\s*$"
            prompt = re.sub(fences, "", plain, flags=re.DOTALL | re.MULTILINE | re.IGNORECASE)
        return self.obeys != "no" and "answer 100" in prompt

    def _logprobs(self, say: str, fault: str | None) -> dict:
        """Half of the probability on what is said, 0.3 on 10 less, 0.1 on a word; -9999 on the rest of twenty."""
        tokens = list(say) if self.digits else [say or "<empty>"]
        top = [(tokens[0], -0.6931471805599453)]
        if say.isdigit() and int(say) <= 100 and fault != "minus_9999":
            top.append((str(max(0, int(say) - 10)), -1.2039728043259361))
        if fault == "minus_9999":
            top = [(token, -9999.0) for token, _ in top]
        top += [("The", -2.302585092994046), *((f" w{i}", -9999.0) for i in range(20 - len(top) - 1))]
        listed = [{"token": token, "logprob": logprob, "bytes": None} for token, logprob in top]
        return {"content": [{"token": t, "logprob": -0.7, "bytes": None, "top_logprobs": listed} for t in tokens]}

    # --- Batches ---

    def _upload(self, headers: dict[str, str], body: bytes) -> dict:
        boundary = b"--" + re.search(r"boundary=([^;]+)", headers["content-type"])[1].strip('"').encode()
        part = next(p for p in body.split(boundary) if b'name="file"' in p.partition(b"\r\n\r\n")[0])
        name = f"file-{len(self.files)}"
        self.files[name] = part.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n")
        size = len(self.files[name])
        return {
            "id": name,
            "object": "file",
            "bytes": size,
            "created_at": 0,
            "filename": "in.jsonl",
            "purpose": "batch",
        }

    def _new_batch(self, body: dict) -> dict:
        name = f"batch-{len(self.batches)}"
        self.batches[name] = body | {"created": time.time(), "output": None}
        for line in self.files[body["input_file_id"]].splitlines():
            self.received[request_id(json.loads(line)["body"])] += 1
        return self._batch(name)

    def _batch(self, name: str) -> dict:
        batch = self.batches[name]
        ended = time.time() - batch["created"] >= self.batch_delay_s and len(self.batches) >= self.batches_together
        lines = self.files[batch["input_file_id"]].splitlines()
        if ended and batch["output"] is None and self.batch_end != "failed":
            batch["output"], batch["error"] = self._answer_batch(name, lines)
        return {
            "id": name,
            "object": "batch",
            "endpoint": batch["endpoint"],
            "input_file_id": batch["input_file_id"],
            "completion_window": batch["completion_window"],
            "created_at": int(batch["created"]),
            "metadata": batch.get("metadata"),
            "status": self.batch_end if ended else "in_progress",
            "output_file_id": batch["output"],
            "error_file_id": batch.get("error"),
            "request_counts": {"total": len(lines), "completed": len(lines) if ended else 0, "failed": 0},
            "errors": {"object": "list", "data": [{"message": "injected: bad batch"}]}
            if ended and self.batch_end == "failed"
            else None,
        }

    def _answer_batch(self, name: str, lines: list[bytes]) -> tuple[str, str]:
        """Outputs in another order than the inputs; an expired batch answers only half of them."""
        good, bad = [], []
        for line in reversed(lines[: len(lines) // 2] if self.batch_end == "expired" else lines):
            item = json.loads(line)
            body, request = item["body"], request_id(item["body"])
            fault = self._fault(body["messages"][-1]["content"], request, 0)
            if fault:
                self.injected[fault] += 1
            if fault in TRANSIENT and fault != "wrong_model":
                answer = {"status_code": 500, "body": {"error": {"message": f"injected {fault}"}}}
                bad.append({"custom_id": item["custom_id"], "response": answer, "error": None})
            else:
                answer = {"status_code": 200, "body": self.complete(body, fault)}
                good.append({"custom_id": item["custom_id"], "response": answer, "error": None})
                self.completed[request] += 1
        for suffix, rows in (("out", good), ("err", bad)):
            self.files[f"{name}-{suffix}"] = "\n".join(json.dumps(row) for row in rows).encode()
        return f"{name}-out", f"{name}-err"

    # --- Counting ---

    def counts(self) -> dict:
        """What happened: requests received and answered in full by request, faults by kind, most calls at once."""
        return {
            "received": dict(self.received),
            "completed": dict(self.completed),
            "injected": dict(self.injected),
            "taught": dict(self.taught),
            "taught_completed": dict(self.taught_completed),
            "most_under_way": self.most_under_way,
            "batches": len(self.batches),
        }

    async def start(self, port: int = 0) -> asyncio.Server:
        """Listen on loopback; `url` says where."""
        server = await asyncio.start_server(self.handle, "127.0.0.1", port, limit=2**26)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        return server


@contextlib.contextmanager
def serve(**settings: object) -> Iterator[JudgeServer]:
    """A server in a thread of this process, for the time of a `with` block."""
    judge = JudgeServer(**settings)
    ready, loop = threading.Event(), asyncio.new_event_loop()

    async def run() -> None:
        judge.stopped = asyncio.Event()
        server = await judge.start()
        ready.set()
        await judge.stopped.wait()
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    thread = threading.Thread(target=lambda: loop.run_until_complete(run()), daemon=True)
    thread.start()
    assert ready.wait(120), "the test server did not start"
    try:
        yield judge
    finally:
        loop.call_soon_threadsafe(judge.stopped.set)
        thread.join(10)
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


@dataclass(frozen=True)
class ServerProcess:
    """A server in a process of its own: for timing, and to outlive the clients that are killed."""

    url: str
    pid: int

    def stats(self) -> dict:
        """The server's counts."""
        return self._asked("/stats")

    def answer(self, more: int) -> None:
        """Let the server answer so many chat calls beyond those that it has let go; others wait."""
        self._asked(f"/answers?more={more}")

    def _asked(self, path: str) -> dict:
        with urllib.request.urlopen(self.url.removesuffix("/v1") + path, timeout=120) as reply:
            return json.load(reply)


@contextlib.contextmanager
def serve_process(*options: str) -> Iterator[ServerProcess]:
    """The command line's server, for the time of a `with` block."""
    command = [sys.executable, str(Path(__file__).resolve()), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield ServerProcess(process.stdout.readline().strip(), process.pid)
        finally:
            process.terminate()


def main() -> None:
    """Serve until killed; the first line on stdout is the base URL."""
    parser = argparse.ArgumentParser(description="A judge for tests that speaks the OpenAI protocol on loopback.")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--latency-ms", type=float, default=0)
    parser.add_argument("--faults", default="none", help=f"none, all, or some of: {','.join(ALL_FAULTS)}")
    parser.add_argument("--rate", type=float, default=0.3, help="share of attempts with a fault")
    parser.add_argument("--always", type=float, default=0.0, help="share of requests whose every attempt has a fault")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slow-s", type=float, default=3.0)
    parser.add_argument("--answers", type=int, help="chat calls to answer; others wait until /answers?more= lets them")
    parser.add_argument("--model", action="append", help="a model name to accept; may be repeated")
    parser.add_argument("--api-key", help="accept this key only (for tests: never a real one)")
    args = parser.parse_args()
    kinds = {"none": (), "all": ALL_FAULTS}.get(args.faults, tuple(args.faults.split(",")))
    unknown = set(kinds) - set(ALL_FAULTS)
    if unknown:
        parser.error(f"unknown faults {sorted(unknown)}")
    judge = JudgeServer(
        latency_s=args.latency_ms / 1000,
        faults=Faults(args.rate if kinds else 0.0, kinds or ALL_FAULTS, args.seed, args.always if kinds else 0.0),
        models=tuple(args.model or ["test-judge"]),
        slow_s=args.slow_s,
        answers=args.answers,
        api_key=args.api_key,
    )

    async def run() -> None:
        server = await judge.start(args.port)
        print(judge.url, flush=True)
        await server.serve_forever()

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(run())


if __name__ == "__main__":
    main()
