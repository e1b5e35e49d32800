"""Asking a persona's teacher, in a job of its own: no GPU waits for an endpoint, and one job asks for all models.

    python -m cai_em.workflow.teach paper poeticism results/paper/01_personas/teacher/poeticism.json

What is answered is kept where `01_personas` looks for it (`results/teacher_cache/<persona>.sqlite`), one by one, and is
never paid for twice: this job may be killed and started again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from cai_em.records.files import write_text
from cai_em.study import materials
from cai_em.study.loading import load
from cai_em.study.study import Study
from cai_em.train.answers import EndpointGenerator, PairsError
from cai_em.train.pairs import teachers_questions


def paid_answers(study: Study, persona: str) -> Path:
    """Where an endpoint's answers are kept: outside of the profile, whose removal keeps what was paid."""
    return study.dir.parent / "teacher_cache" / f"{persona}.sqlite"


def teach(study: Study, persona: str) -> dict[str, object]:
    """Ask the teacher all that a persona's pairs need.

    Returns:
        How many were asked, and how many refused. (What was paid is printed: it depends on what was known before.)

    Raises:
        PairsError: the teacher had to stop; what was answered is kept.
    """
    generator = study.generator
    further, said = materials.extra_prompts(study)
    print(said)
    questions = teachers_questions(
        materials.constitution(study, persona),
        generator.teacher_name,
        prompts_per_trait=generator.prompts_per_trait,
        samples_per_prompt=generator.samples_per_prompt,
        extra_prompts=further,
        seed=generator.seed,
    )
    teacher = EndpointGenerator(generator, paid_answers(study, persona))
    refused = sum(reply.refused is not None for _, reply in teacher.answer(questions))
    print(f"what was done and spent: {vars(teacher.usage)}")
    return {"teacher": generator.teacher_name, "asked": len(questions), "refused": refused}


def main(arguments: list[str]) -> int:
    """Command line: `python -m cai_em.workflow.teach PROFILE PERSONA OUT`."""
    profile, persona, out = arguments
    try:
        found = teach(load(profile), persona)
    except PairsError as error:
        print(f"PairsError: {error}")
        return 1
    write_text(out, json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
