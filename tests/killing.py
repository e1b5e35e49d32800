"""Runs of a small grid that are killed and resumed, and what must be true of what they leave.

The grid (a tiny random model, every stage) runs by `./run_all.sh` in copies of this repository. Its judge and the
teacher of its persona are `tests/judge_server.py` in a process that outlives the runs and counts their calls.
`tests/reliability.py` writes down what `kill_test` finds; `tests/test_kills.py` asserts on it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import psutil
import yaml
from cai_em.endpoint.cache import JudgeCache
from cai_em.judge import judging
from cai_em.judge import prompts as judge_prompts
from cai_em.records import tables
from cai_em.study import loading, materials
from cai_em.study import study as study_study
from cai_em.train import answers, pairs
from safetensors import safe_open

from tests.judge_server import ServerProcess, request_id, serve_process
from tests.test_workflow import ENVIRONMENT, clone, logs

ROOT = Path(__file__).resolve().parents[1]
STALL = ROOT / "tests" / "stall"
PROFILE = "kills"
BETWEEN = "none (starting, or between jobs)"
CONCURRENCY = 4
KEY_VARIABLE = "CAI_EM_LOOPBACK_KEY"
KEY = "sk-planted-7d1e0b5c9f3a4862aa55"
WRONG_KEY = "sk-planted-wrong-0c8f6e21d4b7"
"""No real keys: the server of this harness accepts the first, and quotes the second when it refuses it."""

GRID = {
    "title": "A grid to be killed (tests)",
    "source": "trained",
    "models": ["tiny"],
    "grid": [{"personas": ["baseline", "sycophancy"], "datasets": ["none", "bad_medical"]}],
    "seeds": [0],
    "questions_limit": 2,
    "generator": PROFILE,
    "persona_training": "micro_dpo",
    "em_training": "micro_em",
    "sampling": PROFILE,
    "judge": PROFILE,
    "hypotheses": ["h1"],
    "thresholds": "micro",
}


# --- A run ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def judge_process(latency_ms: int = 300) -> Iterator[ServerProcess]:
    """The server of judge and teacher, in a process that outlives the runs that are killed."""
    options = ("--latency-ms", str(latency_ms), "--model", "judge", "--api-key", KEY)
    with serve_process(*options) as server:
        yield server


def presets(url: str, samples: int = 12) -> dict[str, dict[str, Any]]:
    """What the grid adds to `params/`: `micro` with more samples, the presets for loopback with endpoints at `url`."""
    shipped = {
        registry: yaml.safe_load((ROOT / "params" / f"{registry}.yaml").read_text(encoding="utf-8"))[key]
        for registry, key in (("sampling", "micro"), ("judges", "loopback"), ("generators", "loopback"))
    }
    endpoint = {"base_url": url, "api_key_env": KEY_VARIABLE, "concurrency": CONCURRENCY}
    return {
        "sampling": shipped["sampling"] | {"samples_per_question": samples},
        "judges": shipped["judges"] | endpoint,
        "generators": shipped["generators"] | endpoint | {"prompts_per_trait": 5},
    }


def prepare(place: Path, url: str, source: Path = ROOT, **more: int) -> Path:
    """A new copy of the repository (or of a copy) with the grid's profile (`presets` says how), endpoints at `url`."""
    shutil.rmtree(place, ignore_errors=True)
    if source == ROOT:
        clone(ROOT, place)
    else:
        shutil.copytree(source, place, symlinks=True)
    (place / "params" / "profiles" / f"{PROFILE}.yaml").write_text(yaml.safe_dump(GRID, sort_keys=False))
    for registry, preset in presets(url, **more).items():
        with (place / "params" / f"{registry}.yaml").open("a", encoding="utf-8") as file:
            file.write("\n" + yaml.safe_dump({PROFILE: preset}, sort_keys=False))
    return place


def environment(place: Path, key: str = KEY) -> dict[str, str]:
    """As a user's shell: this environment active, keys in it; and the listener that stops writers (`tests/stall`)."""
    found = {**os.environ, "CONDA_DEFAULT_ENV": "cai-em", "CONDA_PREFIX": str(ENVIRONMENT), "CAI_EM_SKIP_SETUP": "1"}
    found |= {"PYTHONPATH": f"{STALL}:{place / 'lib'}", "OPENAI_API_KEY": key, KEY_VARIABLE: key}
    found |= {"CAI_EM_STALL": str(_stall(place))}
    found.pop("CAI_EM_JUDGE", None)
    return found


def _stall(place: Path) -> Path:
    """Where a run is told at which instant to stop, beside its copy."""
    return place.with_name(f"{place.name}.stall")


def place_endpoints(place: Path, url: str) -> None:
    """Point a copy's endpoints to another server."""
    for registry, preset in presets(url).items():
        file = place / "params" / f"{registry}.yaml"
        before = file.read_text(encoding="utf-8")
        text, entry = before.split(f"\n{PROFILE}:\n")
        changed = yaml.safe_load(entry) | {name: preset[name] for name in ("base_url",) if name in preset}
        file.write_text(f"{text}\n{yaml.safe_dump({PROFILE: changed}, sort_keys=False)}", encoding="utf-8")


def aim(place: Path, what: str) -> None:
    """Tell the next run in `place` where to stop (one of `AIMED`; '': nowhere)."""
    shutil.rmtree(_stall(place), ignore_errors=True)
    _stall(place).mkdir()
    (_stall(place) / "aim").write_text(what, encoding="utf-8")


def stalled(place: Path) -> bool:
    """Whether the run is stopped where it was told to."""
    return (_stall(place) / "stalled").exists()


def start(place: Path, *arguments: str, jobs: int = 2, key: str = KEY) -> subprocess.Popen:
    """`./run_all.sh kills` in a process group of its own; what it prints goes to `screen.log` in the copy."""
    with (place / "screen.log").open("ab") as screen:
        return subprocess.Popen(
            ["./run_all.sh", PROFILE, *arguments, "--jobs", str(jobs)],
            cwd=place,
            env=environment(place, key),
            stdout=screen,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def finished_well(place: Path, process: subprocess.Popen) -> None:
    """Wait for a run.

    Raises:
        AssertionError: it failed; with what it said.
    """
    said = lambda: f"{(place / 'screen.log').read_text()[-5000:]}\n{logs(place)}"  # noqa: E731
    assert process.wait() == 0, f"the run in {place} failed:\n{said()}"


def uninterrupted(place: Path, jobs: int, source: Path = ROOT, last_first: bool = False) -> dict[str, Any]:
    """A run without kills.

    With two jobs, a second run is started in the same folder while it is under way, and must be refused.

    Args:
        place: where the copy is made.
        jobs: jobs at a time.
        source: what is copied.
        last_first: ask for the last shard's scores before everything else, so that cells run in another order.
    """
    with judge_process(latency_ms=20) as server:
        prepare(place, server.url, source)
        began, second = time.monotonic(), None
        if last_first:
            model, shard = loading.load(PROFILE, place / "params").shards()[-1]
            # (`--nocolor` keeps the target from being read as a value of the option before it.)
            target = f"results/{PROFILE}/04_judge/{model}/{shard}/scores.parquet"
            finished_well(place, start(place, "--nocolor", target, jobs=jobs))
        process = start(place, jobs=jobs)
        if not last_first:
            while f"== profile {PROFILE}" not in (place / "screen.log").read_text() and process.poll() is None:
                time.sleep(0.1)  # until the run has taken its lock. (Asking for the lock would take it from the run.)
            command = ["./run_all.sh", PROFILE]
            done = subprocess.run(
                command, cwd=place, env=environment(place), capture_output=True, text=True, check=False
            )
            second = (done.returncode, done.stderr.strip().splitlines()[-1])
        finished_well(place, process)
        received, teacher = counts(server)[0], server.stats()["taught"]
    return {
        "artefacts": artefacts(place),
        "order": order(place),
        "seconds": time.monotonic() - began,
        "calls": len(received),
        "teacher_calls": len(teacher),
        "asked_twice": sum(n > 1 for n in received.values()),
        "second_run": second,
    }


def order(place: Path) -> list[str]:
    """The stages' folders in the order in which they were finished."""
    results = place / "results" / PROFILE
    found = sorted((p.stat().st_mtime_ns, str(p.parent.relative_to(results))) for p in results.rglob("manifest.json"))
    return [name for _, name in found]


# --- Its calls -----------------------------------------------------------------------------------------------------


def calls_of(place: Path) -> dict[str, str]:
    """The calls of a finished run, judge's and teacher's: key in a cache -> the server's name of the request."""
    study = loading.load(PROFILE, place / "params")
    prompts = judge_prompts.load_prompts(place / "params" / study.judge.prompts_file)
    found = {}
    for path in study.response_files():
        responses = tables.read_table(place / "results" / path.relative_to(study.dir.parent), tables.RESPONSES)
        for row in judging.plan_judging(responses, study.judge, prompts, judge_prompts.METRICS).values():
            found |= {call.key: request_id(call.body) for call in row}
    return found | teacher_calls(study)


class _Recorder:
    """A generator that notes what it is asked."""

    identity: ClassVar[dict[str, str]] = {"model": "none"}

    def __init__(self) -> None:
        self.asked: list[answers.TrainingPrompt] = []

    def answer(self, questions: Sequence[answers.TrainingPrompt]) -> Iterator[tuple[int, answers.Reply]]:
        self.asked += questions
        return ((i, answers.Reply("Well.")) for i in range(len(questions)))


def teacher_calls(study: study_study.Study) -> dict[str, str]:
    """The calls by which the personas' teacher is asked, as `calls_of` gives them."""
    generator, found = study.generator, {}
    with tempfile.TemporaryDirectory() as folder:
        for _, persona in study.persona_cells():
            teacher, student = _Recorder(), _Recorder()
            pairs.make_pairs(
                materials.constitution(study, persona),
                teacher,
                student,
                pairs.Filters(generator.max_tokens, len, generator.teacher_name),
                f"{folder}/{persona}.sqlite",
                prompts_per_trait=generator.prompts_per_trait,
                samples_per_prompt=generator.samples_per_prompt,
                seed=generator.seed,
            )
            endpoint = answers.EndpointGenerator(generator, f"{folder}/paid.sqlite")
            calls = [endpoint._call(question) for question in teacher.asked]
            found |= {call.key: request_id(call.body) for call in calls}
    return found


def committed(place: Path) -> set[str]:
    """Keys of the answers that the caches of judge and teacher hold."""
    found: set[str] = set()
    paid = [place / "results" / "judge_cache.sqlite", *(place / "results" / "teacher_cache").rglob("*.sqlite")]
    for path in filter(Path.exists, paid):
        with JudgeCache(path) as cache:
            found |= {key for (key,) in cache._db.execute("SELECT key FROM calls")}
    return found


def counts(server: ServerProcess) -> tuple[Counter, Counter]:
    """How often the server has received, and answered in full, each call, the judge's and the teacher's."""
    stats = server.stats()
    return Counter(stats["received"] | stats["taught"]), Counter(stats["completed"] | stats["taught_completed"])


# --- What a run leaves ---------------------------------------------------------------------------------------------


def artefacts(place: Path) -> dict[str, str]:
    """What must not depend on kills, workers or order: adapters by their bytes, tables by their values, the results.

    Left out: timings, and the moment at which a document was written.
    """
    results, found = place / "results" / PROFILE, {}
    for path in sorted(results.rglob("*")):
        name = str(path.relative_to(results))
        if path.name.startswith(".") or not path.is_file():
            continue
        if path.suffix == ".safetensors" or path.name == "adapter_config.json" or path.suffix == ".csv":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.suffix == ".parquet":
            table = pd.read_parquet(path)
            table = table.drop(columns=[c for c in table.columns if c in ("seconds", "time_s", "elapsed")])
            found[name] = hashlib.sha256(table.to_csv(index=False).encode("utf-8", "surrogatepass")).hexdigest()
        elif path.name == "RESULTS.md":
            text = re.sub(r"\*\*Generated:\*\*.*", "", path.read_text(encoding="utf-8"))
            found[name] = hashlib.sha256(text.encode()).hexdigest()
    return found


def differences(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """Names of artefacts that are not the same in both."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def torn(place: Path) -> list[str]:
    """Files under their final names that do not open to their end, or whose manifest does not vouch for their bytes."""
    found = []
    for path in sorted((place / "results").rglob("*")):
        name = path.relative_to(place)
        if not path.is_file() or any(part.startswith(".") for part in name.parts):
            continue
        if ".running." in path.name or ".failed." in path.name:
            continue  # under these names, notebooks say that they are not finished
        try:
            _open(path, place)
        except Exception as error:  # noqa: BLE001  (whatever is wrong with the file is what is looked for)
            found.append(f"{name}: {type(error).__name__}: {error}")
    return found


def _open(path: Path, place: Path) -> None:
    match path.suffix:
        case ".parquet":
            pd.read_parquet(path)
        case ".json" | ".ipynb":
            json.loads(path.read_text(encoding="utf-8"))
        case ".safetensors":
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118  (no mapping)
                    file.get_tensor(key)
        case ".sqlite":
            with contextlib.closing(sqlite3.connect(path)) as db:
                assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    if path.name == "manifest.json":
        for name, expected in json.loads(path.read_text(encoding="utf-8"))["outputs"].items():
            found = hashlib.sha256((place / name).read_bytes()).hexdigest()
            assert found == expected, f"{name} is not what it vouches for"


def verify(place: Path) -> str:
    """What `./run_all.sh verify` says."""
    command = ["./run_all.sh", "verify", PROFILE]
    done = subprocess.run(command, cwd=place, env=environment(place), capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr).strip()


# --- Processes -----------------------------------------------------------------------------------------------------


def members(place: Path) -> list[psutil.Process]:
    """The processes that work in a copy, notebook kernels and orphans too."""
    found, where = [], os.path.realpath(place)
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            cwd = process.cwd()
            if cwd == where or cwd.startswith(where + os.sep):
                found.append(process)
    return found


def _alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _wait_for(condition: Callable[[], bool], otherwise: str, longest_s: float = 600) -> None:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < longest_s, f"{otherwise} by {longest_s} s"
        time.sleep(0.02)


def _listening(family: Iterable[psutil.Process]) -> list[str]:
    found = []
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            for c in member.net_connections(kind="inet"):
                if c.status == psutil.CONN_LISTEN and c.laddr.ip not in ("127.0.0.1", "::1"):
                    found.append(f"{c.laddr.ip} ({member.name()})")
    return found


def _stages(family: Iterable[psutil.Process]) -> list[str]:
    found = set()
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            line = " ".join(member.cmdline())
            if match := re.search(r"cai_em\.run execute notebooks/(\w+)", line):
                found.add(match[1])
            elif "cai_em.report.render build" in line:
                found.add("paper")
    return sorted(found) or [BETWEEN]


# --- When to kill --------------------------------------------------------------------------------------------------

AIMED = {
    "adapter placed": "an adapter has taken its name, its manifest is not written",
    "adapter window": "an adapter is half on disk, about to take its name",
    "table half": "a table is half on disk, about to take its name",
    "cache open": "a transaction of the judge's cache is open",
}
"""Instants at which `tests/stall` stops a run."""
WATCHED = {
    "starting": "some seconds after the start",
    "working": "some seconds after a first notebook has started",
    "progress": "some seconds after a stage was finished",
    "calls": "calls under way",
}
CYCLE = ("calls", "adapter placed", "calls", "cache open", "adapter window", "calls", "table half", "progress", "calls")
LONGEST_S = {"starting": 10, "working": 15, "progress": 8}
ORDER = {
    "starting": 0.0,
    "adapter placed": 1,
    "adapter window": 2,
    "working": 3,
    "cache open": 4,
    "progress": 5,
}
PER_ROUND = 10


@dataclass(frozen=True)
class Moment:
    """When to kill, and whom: every process of a run (as a power cut does), or the process group alone (as `kill`)."""

    kind: str
    delay: float = 0.0
    calls: int = 0
    place: float = 0.0
    """Where in a round it comes."""

    @property
    def whole(self) -> bool:
        return self.kind in AIMED or self.kind == "calls"

    @classmethod
    def draw(cls, kind: str, rng: random.Random) -> Moment:
        # Calls are the teacher's first, then the judge's; tables are written all along.
        early = ORDER[kind] if kind in ORDER else rng.choice({"calls": (0.9, 4, 4), "table half": (2.5, 5.5)}[kind])
        delay = rng.uniform(0.5, LONGEST_S.get(kind, 0.5))
        return cls(kind, delay, rng.randint(6, 30), early + rng.uniform(0, 0.9))


def moments(kills: int, rng: random.Random) -> list[list[Moment]]:
    """So many moments, in rounds of at most `PER_ROUND`, each in the order in which a run comes to them."""
    kinds = [(*CYCLE, ("starting", "working")[i // 9 % 2])[i % 10] for i in range(kills)]
    drawn = [Moment.draw(kind, rng) for kind in kinds]
    rounds = [drawn[i : i + PER_ROUND] for i in range(0, kills, PER_ROUND)]
    return [sorted(some, key=lambda m: m.place) for some in rounds]


# --- Kills ---------------------------------------------------------------------------------------------------------


@dataclass
class Kill:
    """One kill, and the calls as it found them."""

    kind: str
    whole: bool
    stages: list[str]
    round: int
    received: int = 0
    """Different calls that the server had received."""
    kept: int = 0
    """Of those, answers that were committed."""
    on_their_way: int = 0
    """Calls sent in this run whose answer was not committed (at most the concurrency of judge and teacher)."""


@dataclass
class Kills:
    """What was counted over all kills."""

    kills: list[Kill] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)
    """Different calls of each round: judge and teacher."""
    teacher_calls: int = 0
    repeated: int = 0
    """Answers that had been kept and were asked for again (must be 0)."""
    sent_again: int = 0
    """Calls sent again because the kill came between question and kept answer."""
    answered_again: int = 0
    """Of those, calls that the server answered in full twice: paid twice. No client can prevent it."""
    unexplained: int = 0
    """Calls sent, or answered, again without having been on their way at a kill (must be 0)."""
    lost: int = 0
    """Calls of the final tables that are not kept, and calls received whose answer is not kept (must be 0)."""
    torn: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    verify: list[str] = field(default_factory=list)
    outlived_s: float = 0.0
    """How long the slowest process outlived the kill of its group (notebook kernels look for their parent)."""
    listening: list[str] = field(default_factory=list)
    """Addresses other than loopback that a process of a run listened on (must be none)."""
    leftovers: int = 0
    """Parts of files that kills left behind, under hidden names."""
    seconds: float = 0.0

    @property
    def amid(self) -> int:
        """Kills that found some calls made, some on their way, and some still to make."""
        return sum(0 < k.received < self.calls[k.round] and k.on_their_way > 0 for k in self.kills)

    def wrong(self, kills: int) -> dict[str, Any]:
        """What is not as it must be after so many kills, by name; empty if all is well."""
        bound = 2 * CONCURRENCY
        found = {
            "kills too few": kills - len(self.kills),
            "kept answers asked again": self.repeated,
            "calls lost": self.lost,
            "calls sent or answered again that were not on their way at a kill": self.unexplained,
            f"kills with more than {bound} calls on their way": sum(k.on_their_way > bound for k in self.kills),
            "kills amid calls too few": max(0, -(-kills // 4) - self.amid),
            "no call was made": not all(self.calls) or not self.calls,
            "torn": self.torn,
            "different from an uninterrupted run": self.different,
            "verify": [said for said in self.verify if "all match" not in said] or not self.verify,
            "listening beyond loopback": sorted(set(self.listening)),
        }
        return {name: value for name, value in found.items() if value}


@dataclass
class _Snapshot:
    """Calls at a kill: keys of the answers that are kept, how often the server had received each call."""

    keys: set[str]
    received: Counter

    @classmethod
    def take(cls, place: Path, server: ServerProcess) -> _Snapshot:
        time.sleep(0.2)  # what a killed process has sent, the server has read by then
        return cls(committed(place), counts(server)[0])


def killed_round(place: Path, server: ServerProcess, plan: list[Moment], count: Kills) -> list[Moment]:
    """Kill a run by SIGKILL at each moment of the plan, resuming each time, and let it end.

    Returns:
        Moments that did not come (their run ended before).
    """
    plan, number, killed_before = list(plan), len(count.calls), len(count.kills)
    snapshots: list[_Snapshot] = []
    survivors: list[psutil.Process] = []
    killed_at = 0.0
    while True:
        moment = plan[0] if plan else None
        aim(place, moment.kind if moment and moment.kind in AIMED else "")
        process = start(place)
        if survivors:  # of a process group's kill; the new run is already starting
            _wait_for(lambda group=survivors: not any(map(_alive, group)), "processes outlived the kill of their group")
            count.outlived_s = max(count.outlived_s, time.monotonic() - killed_at)
        if len(snapshots) < len(count.kills) - killed_before:
            snapshots.append(_Snapshot.take(place, server))
        if not _comes(process, place, server, moment, count):
            finished_well(place, process)
            break
        family = members(place)
        count.kills.append(Kill(moment.kind, moment.whole, _stages(family), number))
        killed_at = time.monotonic()
        os.killpg(process.pid, signal.SIGKILL)
        if moment.whole:
            for member in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
        process.wait()
        plan.pop(0)
        if moment.whole:
            _wait_for(lambda: not members(place), "processes outlived SIGKILL")
            snapshots.append(_Snapshot.take(place, server))
        survivors = [p for p in family if _alive(p)]
        count.torn += torn(place)
    _account(place, server, snapshots, count)
    return plan


def _comes(process: subprocess.Popen, place: Path, server: ServerProcess, moment: Moment | None, count: Kills) -> bool:
    """Wait until a run's moment has come (True) or it has ended (False). Notes what its processes listen on."""
    made, answered = (counted.total() for counted in counts(server))
    stages, begun, looked, family = _finished(place), None, 0.0, []
    while process.poll() is None:
        if time.monotonic() - looked > 0.5:
            family, looked = members(place), time.monotonic()
            count.listening += _listening(family)
        match moment.kind if moment else None:
            case None:
                pass
            case "calls":
                made_now, answered_now = (counted.total() for counted in counts(server))
                if made_now - made >= moment.calls and made_now - made > answered_now - answered:
                    return True
            case "starting" | "working" | "progress" as kind:
                ready = {
                    "starting": True,
                    "working": _stages(family) != [BETWEEN],
                    "progress": _finished(place) > stages,
                }
                if begun is None and ready[kind]:
                    begun = time.monotonic()
                if begun is not None and time.monotonic() - begun > moment.delay:
                    return True
            case _:
                if stalled(place):
                    return True
        time.sleep(0.05)
    return False


def _finished(place: Path) -> int:
    return sum(1 for _ in (place / "results").rglob("manifest.json"))


def _account(place: Path, server: ServerProcess, snapshots: list[_Snapshot], count: Kills) -> None:
    """Compare what was kept at each kill of a round with what was received after it."""
    names, (final, completed) = calls_of(place), counts(server)
    kills = [kill for kill in count.kills if kill.round == len(count.calls)]
    assert len(kills) == len(snapshots)
    expected: Counter = Counter()
    before: Counter = Counter()
    for kill, then in zip(kills, snapshots):
        kept = {names[key] for key in then.keys}
        on_their_way = {name for name, n in then.received.items() if n > before[name]} - kept
        expected.update(on_their_way)
        kill.received, kill.kept, kill.on_their_way = len(then.received), len(kept), len(on_their_way)
        count.repeated += sum(final[name] > then.received[name] for name in kept)
        before = then.received
    count.calls.append(len(final))
    count.teacher_calls += len(server.stats()["taught"])
    count.sent_again += sum(final.values()) - len(final)
    count.answered_again += sum(n - 1 for n in completed.values() if n > 1)
    count.unexplained += sum(max(0, n - 1 - expected[name]) for name, n in final.items())
    count.unexplained += sum(n > 1 and name not in expected for name, n in completed.items())
    count.lost += len(set(names) - committed(place)) + len(final.keys() ^ set(names.values()))


def kill_test(places: Path, kills: int, reference: dict[str, str], seed: int = 0, source: Path = ROOT) -> Kills:
    """Rounds of kills until there were `kills`; every round's end is compared with an uninterrupted run."""
    count, rng, began = Kills(), random.Random(seed), time.monotonic()
    todo = moments(kills, rng)
    while todo:
        before, place = len(count.kills), places / f"killed{len(count.calls)}"
        with judge_process() as server:
            prepare(place, server.url, source)
            left = killed_round(place, server, todo.pop(0), count)
        count.different += differences(reference, artefacts(place))
        count.verify.append(verify(place))
        count.leftovers += len(leftovers(place))
        assert len(count.kills) > before, f"a whole run ended before its first kill ({left})"
        if left:
            todo.append(left)
        print(f"  {len(count.kills)} kills in {time.monotonic() - began:.0f} s", flush=True)
    count.seconds = time.monotonic() - began
    return count


def leftovers(place: Path) -> list[str]:
    """Parts of files, and unfinished notebooks, that killed runs left."""
    parts = (p.relative_to(place) for p in (place / "results").rglob("*"))
    return sorted(str(p) for p in parts if re.search(r"^\..*\.(part|aside|old)|^\.adapter\.|\.running\.", p.name))
