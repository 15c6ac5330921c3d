"""Questions with options beside lm-evaluation-harness, and questions of the toy world.

A question's options are scored by log-likelihood: by lm-eval's own model class, which reads prompt
and option anew for each, and by dominie, which reads what they share once. Both get the same model
and the same texts, without a chat template; the two take turns. `largest_difference` is between
their log-likelihoods of an option, in nats.

With the variables DOMINIE_SMOLLM2 (a folder of SmolLM2-135M) and DOMINIE_SHARED_DATA (a folder with
general/hellaswag.jsonl) that is SmolLM2 on HellaSwag; else a small random model on made-up
questions. The last row is 500 questions of the toy world, answered and scored.

    python benchmarks/evaluation.py [--quick] [--json]

``--quick`` ends within 50 seconds on two cores; a full run also writes a dated table to
``benchmarks/results``.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _results
import torch
from _results import DEVICE, Row

from dominie.data.conversations import Conversation, read_conversations
from dominie.data.sources import Source
from dominie.evaluation.likelihood import choice
from dominie.evaluation.scoring import generate_outputs, score_outputs
from dominie.evaluation.task import MetricSettings, Question, questions
from dominie.toyworld.names import materialise
from dominie.toyworld.toy_models import WORDS, toy_config, word_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator

#: The words of the messages and nothing else, as lm-eval has them.
PLAIN = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
MODEL = Path(os.environ.get("DOMINIE_SMOLLM2", ""))
HELLASWAG = Path(os.environ.get("DOMINIE_SHARED_DATA", "")) / "general" / "hellaswag.jsonl"
BATCH = 16


def loaded() -> tuple[str, Any, Any]:
    """A name, a model and its tokenizer, which writes no more than the words."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if (MODEL / "config.json").is_file() and HELLASWAG.is_file():
        name, tokenizer = "SmolLM2 on HellaSwag", AutoTokenizer.from_pretrained(MODEL)
        model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    else:
        name, tokenizer = "random, made up", word_tokenizer()
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(toy_config("student", width=128, layers=4))
    tokenizer.chat_template = PLAIN
    return name, model.eval().to(DEVICE), tokenizer


def texts(count: int, real: bool) -> list[tuple[str, list[str]]]:
    """Prompts with their options, each with the space before it."""
    if real:
        with HELLASWAG.open(encoding="utf-8") as file:
            rows = [json.loads(line) for line, _ in zip(file, range(count), strict=False)]
        return [(row["prompt"], [f" {each}" for each in row["options"]]) for row in rows]
    words = [word for word in WORDS if word.isalpha()]
    random = torch.Generator().manual_seed(0)

    def drawn(length: int) -> str:
        chosen = torch.randint(len(words), (length,), generator=random).tolist()
        return " ".join(words[at] for at in chosen)

    return [(drawn(60), [f" {drawn(20)}" for _ in range(4)]) for _ in range(count)]


def ours(model: Any, tokenizer: Any, asked: list[tuple[str, list[str]]]) -> list[list[float]]:
    """The log-likelihoods of dominie."""
    rows = [
        Conversation(
            messages=[{"role": "user", "content": p}, {"role": "assistant", "content": options[0]}],
            fields={"options": options},
        )
        for p, options in asked
    ]
    scored = choice(model, tokenizer, questions(tokenizer, rows), batch=BATCH)
    return [sample["log_likelihoods"] for sample in scored.samples]


def theirs(model: Any, tokenizer: Any, asked: list[tuple[str, list[str]]]) -> list[list[float]]:
    """Those of lm-eval."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH)
    pairs = [(prompt, option) for prompt, options in asked for option in options]
    found = iter(
        harness.loglikelihood(
            [Instance("loglikelihood", {}, pair, at) for at, pair in enumerate(pairs)],
            disable_tqdm=True,
        )
    )
    return [[next(found)[0] for _ in options] for _, options in asked]


def beside_lm_eval(quick: bool) -> Row:
    """The two of them on the same questions."""
    name, model, tokenizer = loaded()
    real = name.startswith("SmolLM2")
    asked = texts((4 if quick else 32) if real else (100 if quick else 1000), real)
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    found: dict[str, list[list[float]]] = {}
    for _ in range(2 if quick or real else 3):
        for way in (ours, theirs):
            started = time.perf_counter()
            found[way.__name__] = way(model, tokenizer, asked)
            seconds[way.__name__].append(time.perf_counter() - started)
    pairs = [
        (a, b)
        for mine, other in zip(found["ours"], found["theirs"], strict=True)
        for a, b in zip(mine, other, strict=True)
    ]
    same = [
        mine.index(max(mine)) == other.index(max(other))
        for mine, other in zip(found["ours"], found["theirs"], strict=True)
    ]
    ratios = [a / b for a, b in zip(seconds["ours"], seconds["theirs"], strict=True)]
    return {
        "what": name,
        "questions": len(asked),
        "seconds": round(statistics.median(seconds["ours"]), 2),
        "lm_eval_seconds": round(statistics.median(seconds["theirs"]), 2),
        "ratio": round(statistics.median(ratios), 3),
        "largest_difference": f"{max(abs(a - b) for a, b in pairs):.1e}",
        "same_answers": f"{sum(same)} of {len(same)}",
    }


def toy(quick: bool) -> Row:
    """Questions of the toy world from data to scores, on a student as it is made."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(toy_config("student")).eval().to(DEVICE)
    tokenizer, count = word_tokenizer(), 100 if quick else 500
    with tempfile.TemporaryDirectory() as folder:
        path = materialise(f"toyworld:general?rows={count}", Path(folder), seed=0)
        rows = list(read_conversations(Source(name="toy", path=str(path))))
    started = time.perf_counter()
    asked: list[Question] = questions(tokenizer, rows)
    score_outputs(asked, generate_outputs(model, tokenizer, asked), MetricSettings())
    return {
        "what": "toy world, answered",
        "questions": len(asked),
        "seconds": round(time.perf_counter() - started, 2),
    }


def rows(quick: bool) -> Iterator[Row]:
    """Both parts."""
    yield beside_lm_eval(quick)
    yield toy(quick)


def main() -> None:
    """Measure, print, and after a full run write down."""
    options = _results.parser(__doc__).parse_args()
    parts = _results.gathered(rows(options.quick), as_json=options.json)
    note = "`ratio` is dominie's time by lm-eval's, the median of the rounds."
    _results.finish("evaluation", "Evaluation", parts, options, note=note)


if __name__ == "__main__":
    main()
