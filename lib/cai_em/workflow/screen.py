"""What a run shows: stages, cells done of all, time left, the judge's dollars; before it, what would run and why.

A logger plugin of Snakemake (`--logger cai-em`). Snakemake's own words go to its log file, `.snakemake/log/`; on the
screen are bars on a terminal and a line for each finished job elsewhere. Of its words only warnings, errors and
"Nothing to be done" are shown. In a dry run the jobs are counted by stage and reason instead of listed.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from snakemake_interface_logger_plugins.base import LogHandlerBase
from snakemake_interface_logger_plugins.common import LogEvent

from cai_em.endpoint.cache import JudgeCache
from cai_em.study.study import Study

STAGES = {
    "teach": "teacher's answers",
    "persona": "personas",
    "finetune": "fine-tuning",
    "sample": "sampling",
    "judge": "judging",
    "published": "import",
    "audit": "import",
    "trajectories": "H3: trajectories",
    "steering": "H4: steering",
}
"""A rule's stage in words; the rules that are not here analyse and write."""
REST = "analysis, paper"
EVERY_S = 60
"""Without a terminal: how often a line says how far the cells of long jobs are, if that has changed."""

WHY = {
    "Forced execution": "asked for",
    "Missing output files": "not made yet",
    "Incomplete output files": "interrupted",
    "Set of input files": "other inputs than before",
    "Code has changed": "code or settings changed",
    "Params have changed": "code or settings changed",
    "Updated input files": "an input is newer",
    "Input files updated by another job": "follows from another job",
}
"""The beginning of Snakemake's reason -> in short, a job's own cause before what follows from other jobs."""


def stage_of(rule: str) -> str:
    """The stage of a rule in words."""
    return STAGES.get(rule, REST)


def why(reason: str) -> str:
    """Snakemake's reason for a job in a few words: its first cause."""
    return next((short for begin, short in WHY.items() if begin in reason), reason.split(":")[0])


def duration(seconds: float) -> str:
    """Seconds as `45 s`, `12 min`, `3 h 20 min` or `2 d 4 h`."""
    seconds = round(seconds)
    if seconds < 100:
        return f"{seconds} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


@dataclass
class Underway:
    """A job under way or to come.

    Attributes:
        stage: in words.
        cells: how many conditions (or adapters) it makes.
        made: files that it has left so far, one for each finished cell; empty where cells are not seen one by one.
    """

    stage: str
    cells: int = 1
    made: Callable[[], Iterable[Path]] = tuple
    name: str = ""
    begun: float = 0.0

    def done(self) -> int:
        """Cells finished since the job began."""
        return min(self.cells, sum(path.is_file() and path.stat().st_mtime >= self.begun for path in self.made()))


def job_of(study: Study, rule: str, wildcards: Mapping[str, str]) -> Underway:
    """A job by its rule and wildcards: its stage and its cells."""
    model, shard = wildcards.get("model", ""), wildcards.get("shard", "")
    if rule == "finetune":
        cells = study.finetune_job(model, wildcards["persona"], int(wildcards["part"]))
        return Underway(stage_of(rule), len(cells), lambda: [study.em_dir(c) / "manifest.json" for c in cells])
    if rule == "sample":
        place = study.sample_dir(model, shard) / "cells"
        return Underway(stage_of(rule), len(study.shard_cells(model, shard)), lambda: place.glob("*.parquet"))
    if rule == "judge":
        return Underway(stage_of(rule), len(study.shard_cells(model, shard)))
    return Underway(stage_of(rule))


@dataclass
class Progress:
    """How far a run is. Times of cells are this run's own: a stage of which nothing is finished has none.

    Attributes:
        total: stage -> cells to make in this run.
        dollars: what the judge has cost so far, in all runs; None where the judge costs nothing.
        cap: at how many dollars it stops.
    """

    total: Counter[str] = field(default_factory=Counter)
    dollars: Callable[[], float] | None = None
    cap: float | None = None
    clock: Callable[[], float] = time.time

    def __post_init__(self) -> None:
        self.finished: Counter[str] = Counter()
        self.spent: dict[str, float] = defaultdict(float)
        self.running: dict[int, Underway] = {}
        self.most_at_once = 1
        self.begun = self.clock()
        self.dollars_before = self.dollars() if self.dollars else 0.0

    @classmethod
    def of(cls, study: Study, jobs: Iterable[tuple[str, Mapping[str, str]]]) -> Progress:
        """The progress of a run that is about to begin.

        Args:
            study: the study.
            jobs: rule and wildcards of every job to run.
        """
        total = Counter(dict.fromkeys([*STAGES.values(), REST], 0))  # in the order of the work
        for job in (job_of(study, rule, wildcards) for rule, wildcards in jobs if rule != "all"):
            total[job.stage] += job.cells
        total += Counter()  # without those that have nothing to do
        judge = study.judge
        if study.profile.source != "trained" or judge is None or judge.kind != "openai":
            return cls(total)
        place, model = study.dir.parent / "judge_cache.sqlite", judge.model

        def dollars() -> float:
            if not place.is_file():
                return 0.0
            with JudgeCache(place) as cache:
                return cache.spent(model).usd

        return cls(total, dollars, judge.cost_cap_usd)

    def begin(self, number: int, job: Underway) -> None:
        """A job has begun."""
        job.begun = self.clock()
        self.running[number] = job
        self.most_at_once = max(self.most_at_once, len(self.running))

    def end(self, number: int, *, failed: bool = False) -> Underway | None:
        """A job has ended; None where it was not known, or has ended before."""
        job = self.running.pop(number, None)
        if job and not failed:
            self.finished[job.stage] += job.cells
            self.spent[job.stage] += self.clock() - job.begun
        return job

    def done(self) -> Counter[str]:
        """Cells finished, by stage."""
        return self.finished + Counter({s: n for s, n in self._under_way().items() if n})

    def _under_way(self) -> Counter[str]:
        found: Counter[str] = Counter()
        for job in list(self.running.values()):
            found[job.stage] += job.done()
        return found

    def left(self) -> tuple[float, float]:
        """Seconds to go by the pace of the cells finished so far, and of what share of the cells to go these speak: a
        stage without a finished cell has no pace yet."""
        seconds, known, to_go = 0.0, 0, 0
        done, now = self.done(), self.clock()
        for stage, total in self.total.items():
            cells, busy, remain = done[stage], self.spent[stage], max(0, total - done[stage])
            busy += sum(now - job.begun for job in list(self.running.values()) if job.stage == stage and cells)
            to_go += remain
            if cells:
                seconds += remain * busy / cells
                known += remain
        return seconds / self.most_at_once, known / to_go if to_go else 1.0

    def line(self) -> str:
        """Cells, time, dollars in a line."""
        done, total = sum(self.done().values()), sum(self.total.values())
        parts = [f"{done} of {total} cells", duration(self.clock() - self.begun)]
        seconds, known = self.left()
        if done < total:
            # A bound that leaves out most of what is to be done would only mislead.
            told = f"{'about' if known == 1 else 'at least'} {duration(seconds)} left"
            parts.append(told if seconds and known >= 0.5 else "time left not known yet")
        if self.dollars:
            spent = self.dollars()
            cap = f" of at most ${self.cap:g}" if self.cap else ""
            parts.append(f"judge ${spent - self.dollars_before:.2f} now, ${spent:.2f} in all{cap}")
        return " · ".join(parts)

    def __rich__(self) -> Group:
        """Bars, a stage a line; asked for by the screen twice a second."""
        done = self.done()
        table = Table.grid(padding=(0, 1), expand=True)
        table.add_column(no_wrap=True, min_width=17)
        table.add_column(width=20)
        table.add_column(no_wrap=True, justify="right", min_width=7)
        table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        for stage, total in self.total.items():
            names = [job.name for job in list(self.running.values()) if job.stage == stage]
            style = "green" if done[stage] >= total else "bold" if names else "dim"
            bar = ProgressBar(total=total, completed=done[stage], width=20, complete_style="cyan")
            table.add_row(Text(stage, style), bar, f"{done[stage]}/{total}", Text(", ".join(names), "cyan"))
        return Group(table, Text(self.line(), "bold", no_wrap=True, overflow="ellipsis"))


class Screen(LogHandlerBase):
    """The handler that Snakemake gives its events to."""

    def __post_init__(self) -> None:
        dry = self.common_settings.dryrun
        self.console = Console(file=sys.stdout if dry else sys.stderr, no_color=self.common_settings.nocolor or None)
        self.console.soft_wrap = not self.console.is_terminal
        self.planned: Counter[tuple[str, str]] = Counter()
        self.study: Study | None = None
        self.progress: Progress | None = None
        self.live: Live | None = None
        self.closed = threading.Event()

    writes_to_stream = property(lambda self: True)
    writes_to_file = property(lambda self: False)
    has_filter = property(lambda self: True)
    has_formatter = property(lambda self: True)
    needs_rulegraph = property(lambda self: False)

    def emit(self, record: logging.LogRecord) -> None:
        """An event of Snakemake, or of the Snakefile: `begin`, which brings the study and the jobs to run."""
        said: dict[str, Any] = record.__dict__
        match said.get("event"):
            case "begin":
                self._begin(said["study"], said["jobs"])
            case LogEvent.JOB_INFO if said["rule_name"] != "all":
                if self.common_settings.dryrun:
                    self.planned[stage_of(said["rule_name"]), why(said["reason"])] += 1
                elif self.progress and self.study:
                    job = job_of(self.study, said["rule_name"], dict(said["wildcards"] or {}))
                    job.name = str(said["rule_msg"] or said["rule_name"])
                    self.progress.begin(said["jobid"], job)
                    if not self.live:
                        self._say(f"begins: {job.name}")
            case LogEvent.JOB_FINISHED:
                self._end(said["job_id"])
            case LogEvent.JOB_ERROR:
                if self.progress:
                    self.progress.end(said["jobid"], failed=True)
                log = "".join(f"; its log: {path}" for path in said["log"])
                self._say(f"FAILED: {said['rule_msg'] or said['rule_name']}{log}", "bold red")
            case None:
                text = record.getMessage()
                if record.levelno >= logging.WARNING or text.startswith(("Nothing to be done", "Complete log")):
                    self._say(text, "yellow" if record.levelno < logging.ERROR else "red", stamp=False)
            case LogEvent.ERROR | LogEvent.GROUP_ERROR:
                self._say(record.getMessage(), "bold red", stamp=False)

    def _begin(self, study: Study, jobs: Iterable[tuple[str, Mapping[str, str]]]) -> None:
        self.study, self.progress = study, Progress.of(study, jobs)
        if self.console.is_terminal:
            self.live = Live(self.progress, console=self.console, refresh_per_second=2)
            self.live.start()
        else:
            threading.Thread(target=self._now_and_then, daemon=True).start()

    def _end(self, number: int) -> None:
        job = self.progress.end(number) if self.progress else None
        if job and self.progress:
            took = duration(self.progress.clock() - job.begun)
            self._say(f"done: {job.name} ({took})" + ("" if self.live else f"; {self.progress.line()}"))

    def _now_and_then(self) -> None:
        before = None
        while self.progress and not self.closed.wait(EVERY_S):
            now = self.progress.done()
            if now != before and before is not None:
                self._say(self.progress.line())
            before = now

    def _say(self, text: str, style: str = "", stamp: bool = True) -> None:
        at = f"[dim]{time.strftime('%H:%M:%S')}[/dim] " if stamp else ""
        self.console.print(f"{at}{escape(text)}", style=style, highlight=False)

    def close(self) -> None:
        """The run is over: the bars stay as they are; of a dry run the counts are shown."""
        self.closed.set()
        if self.live:
            self.live.stop()
        if self.planned:
            self.console.print(_counts(self.planned))
            self.planned.clear()  # Snakemake closes its handlers twice
        super().close()


def _counts(planned: Counter[tuple[str, str]]) -> Table:
    """Jobs that would run, by stage and reason."""
    reasons = list(dict.fromkeys([*WHY.values(), *(reason for _, reason in planned)]))
    reasons = [r for r in reasons if any(reason == r for _, reason in planned)]
    table = Table(
        box=None, pad_edge=False, title="What would run, in jobs (each of them: --jobs-list)", title_justify="left"
    )
    for name in ("", *reasons, "all"):
        table.add_column(name, justify="right" if name else "left")
    stages = [s for s in [*dict.fromkeys(STAGES.values()), REST] if any(stage == s for stage, _ in planned)]
    for stage in stages:
        counts = [planned[stage, reason] for reason in reasons]
        table.add_row(stage, *(str(n or "") for n in counts), str(sum(counts)))
    sums = [sum(planned[s, r] for s in stages) for r in reasons]
    table.add_row("all", *map(str, sums), str(sum(sums)), style="bold")
    return table
