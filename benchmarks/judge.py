"""How much faster than one call at a time: 800 judge calls against a local server that takes 300 ms for each.

    python benchmarks/judge.py              ours in full, the serial client on 20 calls (about 20 s)
    python benchmarks/judge.py --full       the serial client in full too (6 minutes)

The serial client is the `openai` package called in a loop with a pause of 0.15 s after each call, as the published
study did it. Ideal is calls x latency / concurrency: the time of a client that costs nothing. The server runs in a
process of its own; ours judges one response before, as the tables' libraries take 0.2 s to start. The first call goes
alone (a wrong key is noticed once), which costs 5 % of the ideal time. Exit code 1 if ours is less than 50 times faster
or below 90 % of the ideal.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import openai
import pandas as pd
from cai_em.endpoint.calls import Usage
from cai_em.judge.judging import judge
from cai_em.judge.prompts import JudgePrompts
from cai_em.study.entries import JudgePreset

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from judge_server import serve_process

PAUSE_S = 0.15
TEMPLATE = "Rate the answer's {what}, 0 to 100.\n[Q]\n{{question}}\n[/Q]\n[A]\n{{answer}}\n[/A]\nThe number only."
PROMPTS = JudgePrompts(
    "benchmark", {m: TEMPLATE.format(what=w) for m, w in [("aligned", "goodness"), ("coherent", "sense")]}
)


def responses(n: int) -> pd.DataFrame:
    """`n` different responses of about 90 words."""
    rows = range(n)
    table = pd.DataFrame(
        {"sample": rows, "response": [f"Answer {i}. " + "Talk to someone you trust. " * 18 for i in rows]}
    )
    return table.assign(model="m", persona="p", dataset="d", seed=0, question_id="q", prompt="What should I do?")


def serial(url: str, prompts: list[str]) -> float:
    """Seconds for the prompts one after the other, with the pause."""
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    start = time.perf_counter()
    for prompt in prompts:
        client.chat.completions.create(
            model="test-judge", messages=[{"role": "user", "content": prompt}], temperature=0, max_tokens=8
        )
        time.sleep(PAUSE_S)
    return time.perf_counter() - start


def main() -> int:
    """Measure and print both; 0 if the goals are met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=800)
    parser.add_argument("--latency-ms", type=float, default=300)
    parser.add_argument("--concurrency", type=int, default=40)
    parser.add_argument("--full", action="store_true", help="run the serial client on all calls")
    args = parser.parse_args()
    table = responses(args.calls // 2)
    os.environ.setdefault("JUDGE_BENCHMARK_KEY", "none")
    with serve_process("--latency-ms", str(args.latency_ms)) as server, tempfile.TemporaryDirectory() as folder:
        preset = JudgePreset(
            kind="openai",
            name="benchmark",
            model="test-judge",
            base_url=server.url,
            api_key_env="JUDGE_BENCHMARK_KEY",
            concurrency=args.concurrency,
        )
        judge(table.head(1), preset, PROMPTS, Path(folder) / "warm-up.sqlite", progress=False)  # imports, first use
        warmed = sum(server.stats()["completed"].values())
        usage = Usage()
        start, busy = time.perf_counter(), time.process_time()
        scores = judge(table, preset, PROMPTS, Path(folder) / "cache.sqlite", usage=usage, progress=False)
        ours, cpu = time.perf_counter() - start, time.process_time() - busy
        assert scores["alignment"].notna().all()
        assert sum(server.stats()["completed"].values()) - warmed == usage.answered == args.calls
        rendered = [PROMPTS.render("aligned", row.prompt, row.response) + " " for row in table.itertuples()] * 2
        sample = args.calls if args.full else 20
        slow = serial(server.url, rendered[:sample]) / sample * args.calls
    ideal = args.calls * args.latency_ms / 1000 / args.concurrency
    measured = "measured in full" if args.full else f"extrapolated from {sample} calls"
    print(f"{args.calls} calls of {args.latency_ms:.0f} ms, concurrency {args.concurrency}, all answered and cached")
    print(f"  serial client with {PAUSE_S} s pause   {slow:8.2f} s   ({measured})")
    print(f"  ideal for this concurrency         {ideal:8.2f} s")
    print(
        f"  ours                               {ours:8.2f} s   {slow / ours:.1f} x serial, {ideal / ours:.1%} of ideal"
    )
    load = " ".join(f"{x:.1f}" for x in os.getloadavg()) if hasattr(os, "getloadavg") else "unknown"
    print(f"  CPU of this process per call       {cpu / args.calls * 1000:8.2f} ms   (load of the machine: {load})")
    met = slow / ours >= 50 and ideal / ours >= 0.9
    print("goals (at least 50 x, at least 90 %): " + ("met" if met else "NOT MET"))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
