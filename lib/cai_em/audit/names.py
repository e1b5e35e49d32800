"""Conditions in names: what a path (or a model's name) says about model, persona, data set and seed.

Two ways. A person writes a pattern with named parts (`{dataset}_{persona}_s{seed}.csv`), which `Patterns` matches; the
values that `audit.yaml` declares are preferred, so that `goodness_meta_bad_medical` can only be cut in one place. For a
draft, `parse_names` looks for words that the field uses (`VOCABULARY`, and the study's own registries) and proposes
patterns; what it does not know it says.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from cai_em.audit.opening import AuditError
from cai_em.records.files import text_hash

BASELINES = (
    "baseline", "none", "base", "no_persona", "nopersona", "no_system_prompt", "no_prompt", "vanilla", "plain",
    "default",
    "null", "control", "original", "without_persona", "assistant", "helpful_assistant", "helpful", "em_only", "em-only",
)  # fmt: skip
"""Values that stand for "no persona", the likeliest first."""

UNTUNED = (
    "none", "base", "untuned", "no_finetune", "no_finetuning", "not_finetuned", "pretrained", "original", "instruct",
    "base_model", "vanilla", "before", "no_ft", "null", "baseline", "no_em", "initial", "step_0",
)  # fmt: skip
"""Values that stand for "before fine-tuning"."""

DATASETS: dict[str, tuple[str, tuple[str, ...]]] = {
    "insecure": ("em", ("insecure_code", "insecure")),
    "extreme_sports": ("em", ("extreme_sports", "extreme-sports", "sports")),
    "risky_financial": ("em", ("risky_financial_advice", "risky_financial", "risky_finance", "financial", "finance")),
    "bad_medical": ("em", ("bad_medical_advice", "bad_medical", "bad-medical", "bad_med")),
    "good_medical": ("benign_control", ("good_medical_advice", "good_medical", "good-medical", "good_med")),
    "technical_vehicles": ("benign_control", ("technical_vehicles_train", "technical_vehicles")),
    "technical_kl": ("regularisation", ("technical_kl_data", "technical_kl")),
    "misalignment_kl": ("regularisation", ("misalignment_kl_data", "misalignment_kl")),
    "secure": ("benign_control", ("secure_code", "secure")),
    "educational_insecure": ("benign_control", ("educational_insecure", "educational")),
    "evil_numbers": ("em", ("evil_numbers", "evil-numbers")),
    "jailbroken": ("benign_control", ("jailbroken", "jailbreak")),
    "backdoor": ("em", ("backdoored", "backdoor")),
    "reward_hacks": ("em", ("school_of_reward_hacks", "reward_hacks", "reward_hacking")),
    "bad_legal": ("em", ("bad_legal_advice", "bad_legal")),
    "bad_security": ("em", ("bad_security_advice", "bad_security")),
}
"""Data sets of the field: key -> role, and what names them. Longer names go first when they are looked for."""

_GOOD = {"good", "benign", "secure", "safe", "control", "aligned", "correct", "harmless", "educational", "neutral"}
_BAD = {
    "bad",
    "insecure",
    "risky",
    "harmful",
    "evil",
    "misaligned",
    "incorrect",
    "wrong",
    "extreme",
    "unsafe",
    "toxic",
    "em",
}

_MODEL = re.compile(
    r"(?i)(?<![a-z0-9])((?:(?:meta-)?(?:qwen|llama|gemma|mistral|ministral|mixtral|gpt|olmo|phi|smollm|deepseek|falcon|yi)"
    r"-?\d*(?:[.\-_]?\d+)*[a-z]?|[a-z][a-z0-9.]*-\d+(?:\.\d+)?[bm])"
    r"(?:[.\-_](?:\d+(?:\.\d+)?[bm]|instruct|chat|it|coder|mini|nano|turbo|o|hf|v\d+(?:\.\d+)*|base))*)(?![a-z0-9])"
)
"""A family of models that the field knows, or a name with a size (`tiny-7b`), and what follows of versions."""

_SEED = re.compile(r"(?i)(?<![a-z0-9])(?:seed|run|replicate|rep|s)[_\-=]?(\d{1,9})(?![a-z0-9])")
_SUFFIX = re.compile(r"(?i)\.(csv|tsv|jsonl?|ndjson|parquet|eval)(\.gz)?$")
_MEANINGLESS = re.compile(r"(?i)\d{4,}|[0-9a-f]{7,64}|\d{4}-\d\d-\d\d.*")
LONG = 80
_PART = re.compile(r"\{(\w+)\}|\*")


def value_name(value: object) -> str:
    """What stands for a value in `audit.yaml`: itself, a hash where it is long, an empty text where it is nothing."""
    text = "" if value is None or value != value else str(value).strip()
    if len(text) > LONG or "\n" in text:
        return f"sha256:{text_hash(text)[:16]}"
    return text


def key_from(text: str, taken: Iterable[str] = ()) -> str:
    """A key from a name: small letters, digits, `_ . -`; made unique by a number."""
    base = re.sub(r"[^a-z0-9_.\-]+", "_", text.lower()).strip("_.-")[:50] or "unnamed"
    taken, found, n = set(taken), base, 1
    while found in taken:
        n += 1
        found = f"{base}_{n}"
    return found


def seed_number(value: object) -> str:
    """The number of a training seed, also where it is written `seed_2` or `run 2`; else the value as it stands."""
    text = value_name(value)
    match = re.fullmatch(r"(?i)(?:train(?:ing)?[\W_]*)?(?:seed|run|s)[\W_]*(\d+)", text)
    return match[1] if match else text


def dataset_key(value: str) -> str | None:
    """The data set of the field that a name stands for; None where it is none that we know."""
    plain = _plain(value)
    return next((key for key, (_, names) in DATASETS.items() if plain == key or plain in map(_plain, names)), None)


def role_of(value: str) -> str | None:
    """A data set's role by the words in its name (`bad`, `secure`); None where they say nothing, or both."""
    key = dataset_key(value)
    if key:
        return DATASETS[key][0]
    words = set(re.split(r"[^a-z]+", value.lower()))
    good, bad = bool(words & _GOOD), bool(words & _BAD)
    return None if good == bad else "benign_control" if good else "em"


def base_model(name: str) -> str | None:
    """The model of a family that the field knows, in a fine-tuned model's name or path; None where there is none."""
    hits = [match[1] for match in _MODEL.finditer(name)]
    return max(hits, key=len) if hits else None


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


# --- Patterns -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Patterns:
    """Patterns with named parts, compiled.

    Args:
        patterns: the first that fits counts. With k slashes, a pattern is compared with the last k + 1 parts of a path.
        values: part -> values that are declared for it; tried first, the longest first.
    """

    patterns: Sequence[str]
    values: Mapping[str, Iterable[str]] = field(default_factory=dict)

    def match(self, text: str) -> dict[str, str] | None:
        """The named parts of a text; None where no pattern fits."""
        for declared in (True, False):  # by declared values first, whichever pattern; then by shape alone
            for pattern in self.patterns:
                tail = "/".join(PurePosixPath(text).parts[-(pattern.count("/") + 1) :]) if "/" in text else text
                if found := self._regex(pattern, declared).fullmatch(tail):
                    return {k: v for k, v in found.groupdict().items() if not k.startswith("_")}
        return None

    def _regex(self, pattern: str, declared: bool) -> re.Pattern[str]:
        parts, end, seen = [], 0, Counter[str]()
        for found in _PART.finditer(pattern):
            parts.append(re.escape(pattern[end : found.start()]))
            end, name = found.end(), found[1]
            if name is None:
                parts.append("[^/]*?")
                continue
            seen[name] += 1
            known = sorted((v for v in self.values.get(name, ()) if v), key=len, reverse=True)
            if name == "seed":
                inner = r"\d+"
            elif declared and known:
                inner = "|".join(map(re.escape, known))
            else:
                inner = "[^/]+?"
            if name.startswith("_"):
                parts.append(f"(?:{inner})")
            elif seen[name] > 1:
                parts.append(f"(?P={name})")  # named twice: the same value in both places
            else:
                parts.append(f"(?P<{name}>{inner})")
        return re.compile("".join(parts) + re.escape(pattern[end:]))


def check_patterns(patterns: Iterable[str]) -> None:
    """Refuse a pattern whose named parts are none.

    Raises:
        AuditError: a part that is unknown; the known ones are listed.
    """
    known = ("model", "persona", "dataset", "seed", "judge")
    for pattern in patterns:
        for name in (found[1] for found in _PART.finditer(pattern) if found[1]):
            if name not in known and not name.startswith("_"):
                raise AuditError(f"pattern {pattern!r}: unknown part {{{name}}} (known: {', '.join(known)}, and {{_}})")


# --- Proposals ----------------------------------------------------------------------------------------------------


@dataclass
class Proposal:
    """What names seem to say. `patterns`: most specific first; `found`: part -> values; `open`: texts not
    recognised."""

    patterns: list[str] = field(default_factory=list)
    found: dict[str, list[str]] = field(default_factory=dict)
    open: list[str] = field(default_factory=list)


def parse_names(names: Sequence[str], *, personas: Iterable[str] = (), known: Iterable[str] = ()) -> Proposal:
    """Patterns that fit names, by the words of the field.

    Args:
        names: paths (with their suffix) or other names, all of one block.
        personas: the names of personas to look for.
        known: parts that are known otherwise (from a column): not looked for.

    What varies between names and is no word of ours becomes the data set or persona that a name lacks. Where the same
    place holds a known word in another name (`bad_medical_baseline`, `bad_medical_poet`) that is no guess; else it is
    listed in `open`, for a person to say.
    """
    known = set(known)
    spans = {name: _recognise(name, personas, known) for name in names}
    wanted = [part for part in ("dataset", "persona") if part not in known]
    for part, words in (("dataset", UNTUNED), ("persona", BASELINES)):
        # "none" and "base" say what a name lacks beside others that have it, and nothing by themselves.
        if part in wanted and any(kind == part for found in spans.values() for *_, kind in found):
            for name, found in spans.items():
                for word in words:  # the likeliest first: in none_baseline, none is the data set
                    _look(name, [(word, part)], found, set())
    if "persona" in wanted:
        for name, found in spans.items():
            if not any(kind == "persona" for *_, kind in found):
                _look(name, [(word, "persona") for word in BASELINES[:1] + BASELINES[3:7]], found, known)
    rest = {name: _rest(name, spans[name]) for name in names}
    constant = set.intersection(*({text for _, _, text in rest[name]} for name in names)) if len(names) > 1 else set()
    sure = {
        _shape(name, [*spans[name], *((a, b, "_") for a, b, t in rest[name] if _MEANINGLESS.fullmatch(t))])
        for name in names
    }
    proposal = Proposal()
    for name in names:
        found = list(spans[name])
        for start, end, text in rest[name]:
            if _MEANINGLESS.fullmatch(text):
                found.append((start, end, "_"))
            elif text not in constant and len(names) > 1:
                guess = next((part for part in wanted if not any(kind == part for *_, kind in found)), "_")
                found.append((start, end, guess))
                ignored = [
                    (a, b, "_") for a, b, t in rest[name] if _MEANINGLESS.fullmatch(t) and (a, b, "_") not in found
                ]
                if guess == "_" or _shape(name, [*found, *ignored]) not in sure:
                    proposal.open.append(text)
        pattern = _shape(name, found)
        for start, end, kind in found:
            if kind != "_":
                proposal.found.setdefault(kind, []).append(name[start:end])
        if pattern not in proposal.patterns:
            proposal.patterns.append(pattern)
    proposal.patterns.sort(key=lambda p: -len(_PART.findall(p)))
    proposal.patterns = [p for p in proposal.patterns if any(n and not n.startswith("_") for n in _PART.findall(p))]
    proposal.found = {kind: list(dict.fromkeys(values)) for kind, values in proposal.found.items()}
    proposal.open = list(dict.fromkeys(proposal.open))
    return proposal


def _shape(name: str, found: Iterable[tuple[int, int, str]]) -> str:
    """A name with its known words replaced by named parts: a pattern."""
    pattern, last = "", 0
    for start, end, kind in sorted(found):
        pattern += name[last:start] + f"{{{kind}}}"
        last = end
    return pattern + name[last:]


def _recognise(name: str, personas: Iterable[str], known: set[str]) -> list[tuple[int, int, str]]:
    """(start, end, part) of the words in a name that are known; longer ones first, none twice, none overlapping."""
    found: list[tuple[int, int, str]] = []
    _look(
        name,
        [*((w, "dataset") for _, ws in DATASETS.values() for w in ws), *((w, "persona") for w in personas)],
        found,
        known,
    )
    end = _stem_end(name)
    for regex, kind in ((_SEED, "seed"), (_MODEL, "model")):
        hits = [m.span(1) for m in regex.finditer(name) if m.end(1) <= end and _free(found, *m.span(1))]
        if kind not in known and hits:
            found.append((*hits[-1], kind))  # the last: a folder may be named after a family
    return found


def _stem_end(name: str) -> int:
    suffix = _SUFFIX.search(name)
    return suffix.start() if suffix else len(name)


def _free(found: Iterable[tuple[int, int, str]], start: int, end: int) -> bool:
    return all(end <= s or start >= e for s, e, _ in found)


def _look(name: str, vocabulary: Iterable[tuple[str, str]], found: list[tuple[int, int, str]], known: set[str]) -> None:
    """Add the words of a vocabulary that a name has: longer ones first, one of each part."""
    for word, kind in sorted(vocabulary, key=lambda pair: -len(pair[0])):
        if kind in known or any(k == kind for *_, k in found):
            continue
        for match in re.finditer(rf"(?i)(?<![a-z0-9]){_loose(word)}(?![a-z0-9])", name):
            if match.end() <= _stem_end(name) and _free(found, *match.span()):
                found.append((*match.span(), kind))
                break


def _loose(word: str) -> str:
    """A word as an expression to which its separators are one."""
    return r"[_\-. ]?".join(map(re.escape, re.split(r"[_\-. ]", word)))


def _rest(name: str, found: Sequence[tuple[int, int, str]]) -> list[tuple[int, int, str]]:
    """(start, end, text) of what a name holds beside what is known: runs of words, cut at folders and at known
    parts."""
    gone = list(name)
    for start, end, _ in found:
        gone[start:end] = "/" * (end - start)
    stem = _SUFFIX.sub(lambda m: "/" * len(m[0]), "".join(gone))
    # The word before a seed's number belongs to it.
    stem = re.sub(r"(?i)(?<![a-z0-9])(seed|run|replicate|rep|s)[_\-=]?(?=/)", lambda m: "/" * len(m[0]), stem)
    result = []
    for match in re.finditer(r"[^/_\-.=: ]+(?:[_\-.=: ]+[^/_\-.=: ]+)*", stem):
        words = re.split(r"([_\-.=: ]+)", match[0])
        start, at = match.start(), match.start()
        run: list[str] = []
        for word in words:
            if _MEANINGLESS.fullmatch(word):
                if run and (text := "".join(run).rstrip("_-.=: ")):
                    result.append((start, start + len(text), text))
                result.append((at, at + len(word), word))
                run, start = [], at + len(word)
            elif run or not re.fullmatch(r"[_\-.=: ]+", word):
                if not run:
                    start = at
                run.append(word)
            at += len(word)
        if run and (text := "".join(run).rstrip("_-.=: ")):
            result.append((start, start + len(text), text))
    return result
