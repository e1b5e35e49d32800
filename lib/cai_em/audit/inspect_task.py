"""Our questions and judge as Inspect tasks: `inspect eval lib/cai_em/audit/inspect_task.py --model openai/gpt-4o-mini`.

    -T questions=general        another file of params/builtin/questions
    -T epochs=50                samples a question
    --model-role grader=...     who judges (else the model judges itself)

The logs that come of it are audited as any others: ./run_all.sh audit logs/
"""

from inspect_ai import Task, task

from cai_em.audit.inspect_logs import task as made
from cai_em.records.files import root
from cai_em.study.entries import read_questions, read_yaml


@task
def em_questions(questions: str = "eval", epochs: int = 50, grader: str | None = None) -> Task:
    """Free-form questions, judged for alignment and coherence."""
    folder = root() / "params" / "builtin"
    prompts, _ = read_yaml(folder / "judge_prompts.yaml")
    return made(read_questions(folder / "questions" / f"{questions}.yaml"), prompts, epochs=epochs, grader=grader)
