"""The grid as rules: each runs one notebook for one cell, through papermill.

    snakemake --config profile=demo --dry-run          (./run_all.sh does it with locking and the right settings)

A job runs again when its notebook's code, a library module that the notebook imports, or what it takes from params/
has changed in meaning (`params.code`, `params.settings`), or when an input is newer than its output. A touched or
re-commented file reruns nothing: notebooks are `ancient` inputs, and only their meaning is hashed.
"""

import json
import os
import shlex
from pathlib import Path

from cai_em.records.code import code_hash, meaning_of
from cai_em.records.files import digest, file_hash, free_space
from cai_em.records.keys import NO_DATASET
from cai_em.study import load, settings
from cai_em.workflow.run import failures

PROFILE = os.environ.get("CAI_EM_STUDY") or config.get("profile", "demo")
STUDY = load(PROFILE)
R = os.path.relpath(STUDY.dir)
TRAINED = STUDY.profile.source == "trained"
IMPORTED = os.path.relpath(STUDY.imported) if STUDY.imported else ""
"""Where scores that others made are read into tables (07_published, 07_audit)."""

GPU = 1 if STUDY.profile.gpu else 0
HEAVY = 8 if STUDY.profile.gpu else 1
"""Threads of a heavy job. On CPUs two single-threaded workers beat one with two threads (302 to 186 tokens/s)."""
API = 1 if TRAINED and STUDY.judge.kind == "openai" else 0
VOUCHED = ("manifest.json", "adapter/adapter_model.safetensors")
"""Files of a fine-tuned cell without which its job is not finished."""
HERE = os.environ.get("CAI_EM_LOCAL_RULES", "").split(",")
"""Rules that run where Snakemake does, and not as jobs of a cluster: judging, where its nodes have no internet."""

EXECUTE = (
    "OMP_NUM_THREADS={threads} TOKENIZERS_PARALLELISM=false "
    "python -m cai_em.workflow.run execute {input.notebook} {params.executed} {params.arguments:q} > {log} 2>&1"
)

ON_GPU = "CAI_EM_JOB_GPUS={resources.gpu} " + EXECUTE
"""Of a rule that may ask for a GPU: its job sees one free GPU of this machine and no other (cai_em.workflow.gpu)."""


def notebook(stage):
    return ancient(f"notebooks/{stage}.ipynb")


def arguments(**values):
    """A notebook's parameters as JSON text, keys sorted: the text is part of what makes a job stale."""
    return json.dumps({"profile": PROFILE, **values}, sort_keys=True)


def marks(model, persona):
    """What the fine-tuning jobs of a persona leave when they are finished."""
    return [os.path.relpath(STUDY.finetune_mark(*job)) for job in STUDY.finetune_jobs() if job[:2] == (model, persona)]


def trained_for(cell):
    """Files that vouch for the adapters of a condition."""
    found = [file for persona in STUDY.adapters_of(cell) for file in persona_of(cell.model, persona)]
    return [*found, *(marks(cell.model, STUDY.trained(cell).persona) if cell.dataset != NO_DATASET else [])]


def one_job(stage):
    """`params` of a rule with one job per profile."""
    return {
        "code": code_hash(f"notebooks/{stage}.ipynb"),
        "settings": settings(STUDY, stage),
        "executed": f"{R}/notebooks/{stage}.ipynb",
        "arguments": arguments(),
    }


def persona_of(model, persona):
    path = os.path.relpath(STUDY.persona_dir(model, persona))
    return [f"{path}/adapter/adapter_model.safetensors", f"{path}/manifest.json"]


wildcard_constraints:
    model="[^/]+",
    persona="[^/]+",
    dataset="[^/]+",
    shard="[^/]+",
    part=r"\d+",


PERSONAS = [persona_of(m, p) for m, p in STUDY.persona_cells()] if TRAINED else []
TUNED = [os.path.relpath(STUDY.finetune_mark(*job)) for job in STUDY.finetune_jobs()] if TRAINED else []
for job in STUDY.finetune_jobs() if TRAINED else ():
    # The adapters are no declared outputs (see rule finetune): a mark that vouches for one that is gone must go too.
    there = [STUDY.em_dir(c) / file for c in STUDY.finetune_job(*job) for file in VOUCHED]
    if STUDY.finetune_mark(*job).is_file() and not all(file.is_file() for file in there):
        STUDY.finetune_mark(*job).unlink()
RESPONSES = [os.path.relpath(f) for f in STUDY.response_files()]
SCORES = [os.path.relpath(f) for f in STUDY.score_files()]
OPTIONAL = [
    f"{R}/{stage}/manifest.json"
    for stage, wanted in (("09_trajectories", STUDY.profile.trajectory), ("10_steering", STUDY.profile.steering))
    if wanted
]


rule all:
    default_target: True
    message:
        "all"
    input:
        PERSONAS,
        TUNED,
        RESPONSES,
        SCORES,
        OPTIONAL,
        expand(f"{R}/{{stage}}/manifest.json", stage=["05_validity", "06_results", "08_claims"]),
        f"{R}/RESULTS.md",
        f"{R}/paper/index.html",
        f"{R}/manifest.json",


TAUGHT = TRAINED and STUDY.generator is not None and STUDY.generator.teacher == "openai"
"""Whether chosen answers come from an endpoint: asked by jobs of their own, so that no GPU waits for it."""


def teacher_of(model, persona):
    return [f"{R}/01_personas/teacher/{persona}.json"] if TAUGHT and STUDY.persona_way(model, persona) == "train" else []


rule teach:
    """The teacher's answers to a persona's prompts, for all models."""
    localrule: "teach" in HERE
    message:
        "teach {wildcards.persona}"
    output:
        f"{R}/01_personas/teacher/{{persona}}.json",
    params:
        code=meaning_of("cai_em.train.pairs"),
        settings=lambda wc: settings(STUDY, "01_teacher", persona=wc.persona),
    log:
        f"{R}/logs/01_teacher/{{persona}}.log",
    priority: 20
    resources:
        api=1,
    shell:
        f"python -m cai_em.workflow.teach {shlex.quote(PROFILE)} {{wildcards.persona}} {{output}} > {{log}} 2>&1"


rule persona:
    """A persona's preference pairs and its LoRA adapter (a random control needs the adapter whose norm it takes)."""
    message:
        "persona {wildcards.model}: {wildcards.persona}"
    input:
        notebook=notebook("01_personas"),
        teacher=lambda wc: teacher_of(wc.model, wc.persona),
        norm_of=lambda wc: (
            persona_of(wc.model, STUDY.personas[wc.persona].norm_of) if STUDY.personas[wc.persona].norm_of else []
        ),
    output:
        f"{R}/01_personas/{{model}}/{{persona}}/adapter/adapter_model.safetensors",
        f"{R}/01_personas/{{model}}/{{persona}}/manifest.json",
    params:
        code=code_hash("notebooks/01_personas.ipynb"),
        settings=lambda wc: settings(STUDY, "01_personas", model=wc.model, persona=wc.persona),
        executed=f"{R}/notebooks/01_personas/{{model}}/{{persona}}.ipynb",
        arguments=lambda wc: arguments(model=wc.model, persona=wc.persona),
    log:
        f"{R}/logs/01_personas/{{model}}/{{persona}}.log",
    threads: HEAVY
    priority: 10
    resources:
        gpu=GPU,
    shell:
        ON_GPU


rule finetune:
    """A persona's EM adapters, or a part of them (`cells_per_job`): one load of the model, trained one after the other.

    Declared is the mark of the whole job alone. Snakemake removes what a failed or interrupted job has declared, and
    cells that are finished must stay: the next start goes on after them.
    """
    message:
        "finetune {wildcards.model}: {wildcards.persona}, part {wildcards.part}"
    input:
        notebook=notebook("02_finetune"),
        persona=lambda wc: persona_of(wc.model, active) if (active := STUDY.active_in_training(wc.persona)) else [],
    output:
        f"{R}/02_finetune/{{model}}/{{persona}}/job{{part}}.json",
    params:
        code=code_hash("notebooks/02_finetune.ipynb"),
        settings=lambda wc: [
            settings(STUDY, "02_finetune", model=c.model, persona=c.persona, dataset=c.dataset, seed=c.seed)
            for c in STUDY.finetune_job(wc.model, wc.persona, int(wc.part))
        ],
        executed=f"{R}/notebooks/02_finetune/{{model}}/{{persona}}/job{{part}}.ipynb",
        arguments=lambda wc: arguments(model=wc.model, persona=wc.persona, part=int(wc.part)),
    log:
        f"{R}/logs/02_finetune/{{model}}/{{persona}}/job{{part}}.log",
    threads: HEAVY
    priority: 8 # before sampling: left for last, the longest chain of jobs ends on one worker while the others wait
    resources:
        gpu=GPU,
    shell:
        ON_GPU


rule sample:
    """The responses of one shard: every condition of a persona (or of a model), one engine load."""
    message:
        "sample {wildcards.model}: {wildcards.shard}"
    input:
        notebook=notebook("03_sample"),
        adapters=lambda wc: sorted({a for c in STUDY.shard_cells(wc.model, wc.shard) for a in trained_for(c)}),
    output:
        f"{R}/03_sample/{{model}}/{{shard}}/responses.parquet",
        f"{R}/03_sample/{{model}}/{{shard}}/manifest.json",
    params:
        code=code_hash("notebooks/03_sample.ipynb"),
        settings=lambda wc: settings(STUDY, "03_sample", model=wc.model, shard=wc.shard),
        executed=f"{R}/notebooks/03_sample/{{model}}/{{shard}}.ipynb",
        arguments=lambda wc: arguments(model=wc.model, shard=wc.shard),
    log:
        f"{R}/logs/03_sample/{{model}}/{{shard}}.log",
    threads: HEAVY
    priority: 5
    resources:
        gpu=GPU,
    shell:
        ON_GPU


rule judge:
    """The scores of one shard's responses. `api`: how many judge jobs may share the rate limit."""
    localrule: "judge" in HERE
    message:
        "judge {wildcards.model}: {wildcards.shard}" + (", progress: tail -f {log}" if TRAINED and STUDY.judge.kind == "openai" else "")
    input:
        notebook=notebook("04_judge"),
        responses=f"{R}/03_sample/{{model}}/{{shard}}/responses.parquet",
    output:
        f"{R}/04_judge/{{model}}/{{shard}}/scores.parquet",
        f"{R}/04_judge/{{model}}/{{shard}}/manifest.json",
    params:
        code=code_hash("notebooks/04_judge.ipynb"),
        settings=lambda wc: settings(STUDY, "04_judge", model=wc.model, shard=wc.shard),
        executed=f"{R}/notebooks/04_judge/{{model}}/{{shard}}.ipynb",
        arguments=lambda wc: arguments(model=wc.model, shard=wc.shard),
    log:
        f"{R}/logs/04_judge/{{model}}/{{shard}}.log",
    priority: 5
    resources:
        api=API,
    shell:
        EXECUTE


if STUDY.profile.source == "published":

    rule published:
        """Published evaluation files into the same tables that our own sampling and judging write.

        What could not be had is left out, and comes in when it can be: run_all.sh looks (`cai_em.workflow.arrivals arrived`).
        """
        message:
            "published"
        input:
            notebook=notebook("07_published"),
        output:
            expand(f"{R}/07_published/{{file}}", file=["responses.parquet", "scores.parquet", "repeated.parquet", "missing.json", "manifest.json"]),
        params:
            **one_job("07_published"),
        log:
            f"{R}/logs/07_published.log",
        shell:
            f"python -m cai_em.workflow.arrivals needed {shlex.quote(PROFILE)} {{log}} >&2; {EXECUTE}"


if STUDY.audit is not None:
    from cai_em.audit import files_of

    AUDITED = [os.path.relpath(path) for _, path in files_of(STUDY.audit, STUDY.audit_file.parent)]

    rule audit:
        """Somebody's files into the same tables, by what audit.yaml says they mean; and what the files themselves show."""
        message:
            "audit"
        input:
            notebook=notebook("07_audit"),
            files=lambda wc: AUDITED,
        output:
            expand(f"{R}/07_audit/{{file}}", file=["responses.parquet", "scores.parquet", "repeated.parquet", "findings.parquet", "manifest.json"]),
        params:
            **one_job("07_audit"),
        log:
            f"{R}/logs/07_audit.log",
        shell:
            EXECUTE


REPEATED = [f"{IMPORTED}/repeated.parquet"] if IMPORTED else []
ANALYSES = {
    "05_validity": [RESPONSES, SCORES, REPEATED],
    "06_results": [RESPONSES, SCORES, f"{R}/05_validity/manifest.json"],
    "08_claims": [RESPONSES, SCORES, REPEATED, f"{R}/05_validity/manifest.json"],
    "09_trajectories": [PERSONAS],
    "10_steering": [PERSONAS, TUNED],
    "11_report": [f"{R}/{s}/manifest.json" for s in ("05_validity", "06_results", "08_claims")] + OPTIONAL,
}

HALF = [f"{R}/11_report/paper/{file}" for file in ("_variables.yml", "_generated/sources.json")]
"""The paper's generated half: the profile's own, so that no page shows another profile's numbers."""

PROSE = sorted(p for kind in ("*.qmd", "_quarto.yml", "*.bib", "*.scss", "*.js", "_preview/*") for p in Path("paper").glob(kind))

TEMPLATES = sorted(Path("lib/cai_em/report/templates").glob("*.j2"))
FROZEN = sorted(Path("prereg").glob(f"{STUDY.name}-*.json"))
WORDS = digest([file_hash(p) for p in [*TEMPLATES, *FROZEN]])
"""What documents say, and what was frozen before the data: read by the report and the paper alone, so that a reworded sentence runs nothing else again."""

for name, inputs in ANALYSES.items():

    rule:
        name:
            name.split("_")[1]
        message:
            "{rule}"
        input:
            notebook=notebook(name),
            tables=inputs,
        output:
            f"{R}/{name}/manifest.json" if name != "11_report" else [f"{R}/RESULTS.md", *HALF],
        params:
            **one_job(name),
            **({"words": WORDS} if name == "11_report" else {}),
        log:
            f"{R}/logs/{name}.log",
        threads: {"05_validity": 2, "09_trajectories": HEAVY, "10_steering": HEAVY}.get(name, 1)
        resources:
            gpu=GPU if name in ("09_trajectories", "10_steering") else 0,
            api=API if name in ("09_trajectories", "10_steering") else 0,  # they judge what they sample
        shell:
            ON_GPU


rule paper:
    """The paper with this profile's numbers: by Quarto where it is installed, else the built-in preview."""
    message:
        "paper"
    input:
        HALF,
    output:
        f"{R}/paper/index.html",
    params:
        code=code_hash("notebooks/11_report.ipynb"),
        prose=digest([file_hash(p) for p in PROSE]),
        words=WORDS,
    log:
        f"{R}/logs/paper.log",
    shell:
        f"python -m cai_em.report.render build {shlex.quote(PROFILE)} {{output}} 2>&1 > {{log}} | tee -a {{log}} >&2"


rule seal:
    """The run's own manifest, written last: it vouches for paper, document, executed notebooks and all manifests."""
    message:
        "manifest of the run"
    input:
        PERSONAS,
        TUNED,
        RESPONSES,
        SCORES,
        f"{R}/RESULTS.md",
        f"{R}/paper/index.html",
    output:
        f"{R}/manifest.json",
    log:
        f"{R}/logs/seal.log",
    shell:
        f"python -m cai_em.workflow.run seal {shlex.quote(PROFILE)} > {{log}} 2>&1"


onstart:
    # For the screen (cai_em.workflow.screen): what is to be done, in cells.
    logger.info(None, extra={"event": "begin", "study": STUDY, "jobs": [(j.rule.name, dict(j.wildcards_dict)) for j in workflow.dag.needrun_jobs()]})


onerror:
    failed = failures(STUDY.dir)
    print(f"\n{len(failed)} job(s) failed; each notebook was kept as it stopped, with its error:")
    for path, error in failed.items():
        print(f"  {os.path.relpath(path)}\n    {error}")
    print(free_space(STUDY.dir / "logs"))
    print("Mend the cause and run the same command again: what is finished stays.")
