"""What a run shows: reasons in short, cells of all, time left by its own pace, dollars; on a terminal and in a log."""

import io
import logging
import os
from collections import Counter
from types import SimpleNamespace

import pytest
from cai_em.endpoint.cache import Answer, JudgeCache
from cai_em.study import loading
from cai_em.workflow import screen
from rich.console import Console
from snakemake_interface_logger_plugins.common import LogEvent
from snakemake_interface_logger_plugins.registry import LoggerPluginRegistry

MISSING = "Missing output files: results/x; Input files updated by another job: results/y"
FOLLOWS = "Input files updated by another job: results/y; Params have changed since last execution: before, now"


@pytest.mark.parametrize(
    ("reason", "short"),
    [
        (MISSING, "not made yet"),
        (FOLLOWS, "code or settings changed"),
        ("Input files updated by another job: results/y", "follows from another job"),
        ("Updated input files: params/a", "an input is newer"),
        ("Forced execution", "asked for"),
        ("Something new: results/z", "Something new"),
    ],
)
def test_a_jobs_own_cause_comes_before_what_follows_from_others(reason, short):
    assert screen.why(reason) == short


@pytest.mark.parametrize(
    ("seconds", "said"), [(3, "3 s"), (99, "99 s"), (720, "12 min"), (12_000, "3 h 20 min"), (187_200, "2 d 4 h")]
)
def test_durations_in_words(seconds, said):
    assert screen.duration(seconds) == said


class Clock:
    """A clock that is set by hand."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_cells_within_a_job_count_and_those_of_an_earlier_run_do_not(tmp_path):
    clock = Clock()
    progress = screen.Progress(Counter({"fine-tuning": 4, "judging": 2}), clock=clock)
    made = [tmp_path / name for name in "abcd"]
    progress.begin(7, screen.Underway("fine-tuning", 4, lambda: made, "finetune m: p"))
    for path, at in ((made[0], 990), (made[1], 1010)):  # one from before: its job makes it again
        path.touch()
        os.utime(path, (at, at))
    clock.now = 1030
    assert progress.done() == {"fine-tuning": 1}
    assert "1 of 6 cells · 30 s · at least 90 s left" in progress.line()  # three at 30 s; nothing is judged yet
    progress.total["judging"] = 20  # of most that is to be done nothing is known
    assert "1 of 24 cells · 30 s · time left not known yet" in progress.line()
    progress.total["judging"] = 2
    clock.now = 1040
    progress.end(7)
    assert progress.done() == {"fine-tuning": 4}
    progress.begin(8, screen.Underway("judging", 1))
    progress.begin(9, screen.Underway("judging", 1))
    clock.now = 1050
    progress.end(8)
    # One of two took 10 s, the other has run for 10 s: (10 + 10) s a cell, and two ran at once.
    assert "5 of 6 cells · 50 s · about 10 s left" in progress.line()
    progress.end(9, failed=True)
    assert progress.done()["judging"] == 1, "a failed job has made nothing"
    assert progress.end(9) is None


def test_the_judges_dollars_are_those_of_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CAI_EM_RESULTS", str(tmp_path))
    study = loading.load("paper")
    assert screen.Progress.of(study, []).dollars() == 0
    with JudgeCache(tmp_path / "judge_cache.sqlite") as cache:
        cache.put("a", study.judge.model, Answer(text="90"), (10, 1, 1.5))
        progress = screen.Progress.of(study, [("judge", {"model": "qwen2.5-7b", "shard": "all"}), ("all", {})])
        cache.put("b", study.judge.model, Answer(text="90"), (10, 1, 0.25))
    assert progress.total == {"judging": 324}
    assert "judge $0.25 now, $1.75 in all of at most $200" in progress.line()
    assert screen.Progress.of(loading.load("demo"), []).dollars is None, "a local judge costs nothing"


def handler(dryrun=False) -> screen.Screen:
    """The plugin as Snakemake finds and makes it, writing to text."""
    plugin = LoggerPluginRegistry().get_plugin("cai-em")
    made = plugin.log_handler(SimpleNamespace(dryrun=dryrun, nocolor=False), None)
    made.console = Console(file=io.StringIO(), width=100)
    return made


def record(event, message="", level=logging.INFO, **said) -> logging.LogRecord:
    made = logging.LogRecord("snakemake", level, "", 0, message, None, None)
    made.__dict__.update(event=event, **said)
    return made


def job(number, rule, reason=MISSING, **wildcards) -> logging.LogRecord:
    return record(
        LogEvent.JOB_INFO,
        jobid=number,
        rule_name=rule,
        rule_msg=f"{rule} {wildcards}",
        reason=reason,
        wildcards=wildcards,
    )


def test_a_log_gets_a_line_for_each_job_and_nothing_of_snakemakes_own():
    shown, study = handler(), loading.load("micro")
    shown.emit(record(None, "Building DAG of jobs..."))
    jobs = [("persona", {"model": "tiny", "persona": "sycophancy"}), ("validity", {}), ("all", {})]
    shown.emit(record("begin", study=study, jobs=jobs))
    shown.emit(job(1, "persona", model="tiny", persona="sycophancy"))
    shown.emit(record(LogEvent.JOB_FINISHED, job_id=1))
    shown.emit(job(2, "validity"))
    shown.emit(record(LogEvent.JOB_ERROR, jobid=2, rule_name="validity", rule_msg="validity", log=["logs/05.log"]))
    shown.emit(record(None, "a warning", logging.WARNING))
    shown.emit(record(None, "Nothing to be done (all requested files are present and up to date)."))
    shown.close()
    said = shown.console.file.getvalue()
    assert "DAG" not in said
    assert "\x1b" not in said
    assert "done: persona {'model': 'tiny', 'persona': 'sycophancy'}" in said
    assert "1 of 2 cells" in said
    assert "FAILED: validity; its log: logs/05.log" in said
    assert "a warning" in said
    assert "Nothing to be done" in said


def test_a_dry_run_counts_jobs_by_stage_and_reason():
    shown = handler(dryrun=True)
    for number in range(3):
        shown.emit(job(number, "finetune", model="m"))
    shown.emit(job(3, "judge", FOLLOWS))
    shown.emit(job(4, "paper", FOLLOWS))
    shown.emit(job(0, "all", FOLLOWS))
    shown.close()
    shown.close()
    lines = [line.split() for line in shown.console.file.getvalue().splitlines()]
    assert ["fine-tuning", "3", "3"] in lines
    assert ["judging", "1", "1"] in lines
    assert ["all", "3", "2", "5"] in lines
    assert sum(line[:1] == ["judging"] for line in lines) == 1, "closed twice, shown once"


@pytest.mark.parametrize("width", [80, 140])
def test_bars_fit_the_terminal(width):
    progress = screen.Progress(Counter({"fine-tuning": 34, "judging": 648}), clock=Clock())
    progress.begin(1, screen.Underway("fine-tuning", 17, name="finetune qwen2.5-7b: " + "a long persona's name " * 8))
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system="truecolor")
    with console.capture() as caught:
        console.print(progress)
    plain = Console(file=io.StringIO(), width=width)
    plain.print(progress)
    lines = plain.file.getvalue().splitlines()
    assert "\x1b[" in caught.get(), "in colour"
    assert len(lines) == 3
    assert max(map(len, lines)) <= width
    assert "0/34" in lines[0]
    assert "finetune qwen2.5-7b: a long" in lines[0]
    assert "0 of 682 cells" in lines[2]
