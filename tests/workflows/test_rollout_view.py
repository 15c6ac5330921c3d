"""A look at the answers of a student: the worst first, each token with its divergence."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dominie.cli import app
from dominie.core.display import PlainConsole
from dominie.core.errors import InputError
from dominie.data.tokenization import prompt_ids
from dominie.toyworld.toy_models import word_tokenizer
from dominie.training.rollouts import Rollout, RolloutFiles, RolloutKey
from dominie.workflows.rollout_view import marked_answers, show_answers

TOKENIZER = word_tokenizer()
PROMPT = prompt_ids(TOKENIZER, [{"role": "user", "content": "what is 5 and 4 ?"}])


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


@pytest.fixture
def runs(tmp_path) -> Path:
    """A run with three answers of one stage, one of which no step has learnt from."""
    folder = tmp_path / "mine" / "align" / "rollouts"
    files = RolloutFiles(folder)
    keys = [RolloutKey(1, "shop", 4), RolloutKey(1, "general", 2), RolloutKey(2, "shop", 1)]
    words = ["red cup", "blue cup", "cup"]
    made = [Rollout(k, PROMPT, ids(w), True) for k, w in zip(keys, words, strict=True)]
    files.write(1, 0, "a", made[:2])
    files.write(2, 0, "b", made[2:])
    files.write_divergences(1, 0, {keys[0]: [0.01, 0.02], keys[1]: [3.0, 0.2]})
    TOKENIZER.save_pretrained(folder / "tokenizer")
    (tmp_path / "mine" / "recipe.yaml").write_text("name: mine\n")
    (tmp_path / "mine" / "align" / "stage.json").write_text("{}")
    return tmp_path


def test_the_worst_come_first_and_every_token_has_its_colour(runs):
    answers, tokenizer = marked_answers("mine:align", runs)
    assert [each.rollout.key.row for each in answers] == [2, 4, 1]
    assert [round(each.mean, 3) for each in answers] == [1.6, 0.015, -1.0]
    out = io.StringIO()
    show_answers(answers, tokenizer, PlainConsole(file=out, force_terminal=True, width=200))
    shown = out.getvalue()
    assert "\x1b[1;37;41mblue\x1b[0m\x1b[33m cup" in shown
    assert "general[2]  1.600 nats per token  2 tokens" in shown
    assert "not learnt from yet" in shown
    plain = io.StringIO()
    show_answers(answers[:1], tokenizer, PlainConsole(file=plain, width=200))
    assert "is 5 and 4 ?" in plain.getvalue()
    assert "worst: 'blue' 3.00, ' cup' 0.20" in plain.getvalue()


def test_the_command_chooses_by_step_and_source(runs):
    found = CliRunner().invoke(
        app, ["rollouts", "mine:align", "--runs", str(runs), "--source", "shop", "--limit", "1"]
    )
    assert found.exit_code == 0
    assert "shop[4]" in found.output
    assert "general" not in found.output
    assert "1 more" in found.output


@pytest.mark.parametrize(
    ("wanted", "options", "said"),
    [
        ("mine", {}, "RUN:STAGE"),
        ("mine:alin", {}, "did you mean align"),
        ("mine:align", {"step": 7}, "steps 1 to 2"),
        ("mine:align", {"source": "shp"}, "sources general, shop"),
    ],
)
def test_what_is_not_there_is_named(runs, wanted, options, said):
    with pytest.raises(InputError) as caught:
        marked_answers(wanted, runs, **options)
    assert said in str(caught.value)
