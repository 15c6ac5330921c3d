"""What a teacher reads that is shown the answer is what the template makes of the longer question.

Under templates that write thoughts, or none, into an answer, these are shown with it.
"""

import pytest

from dominie.data.batch import filled
from dominie.data.formats import Conversation
from dominie.data.tokenization import encode
from dominie.teachers.answer_shown import AnswerPrompt

TEXT = " For example: {answer} Now you."
ASKED = (("What is two plus two?", "The answer is four."), ("And five?", "The answer is five."))


def messages(asked, text="{question}"):
    return [
        message
        for question, answer in asked
        for message in (
            {"role": "user", "content": question + text.format(answer=answer, question="")},
            {"role": "assistant", "content": answer},
        )
    ]


@pytest.mark.parametrize(
    ("family", "turns"),
    [
        ("chatml", 2),
        ("gemma", 2),
        ("llama3", 1),
        ("mistral", 2),
        ("phi", 2),
        ("qwen3", 1),
        ("r1", 2),
    ],
)
def test_the_answer_is_read_at_the_end_of_its_question(make_tokenizer, family, turns):
    tokenizer = make_tokenizer(family)
    prompt = AnswerPrompt.of(tokenizer, TEXT)
    row = encode(tokenizer, Conversation(messages(ASKED[:turns]), None, ""))
    read = prompt.row(filled([[(0, row)]]).spans[0])
    longer = encode(tokenizer, Conversation(messages(ASKED[:turns], TEXT), None, ""))
    plain, expected = (
        "".join(tokenizer.decode(ids).split()) for ids in (read.input_ids, longer.input_ids)
    )
    thoughts = "<think></think>" if family == "qwen3" else ""
    assert plain == expected.replace("Forexample:", f"Forexample:{thoughts}")
    kept = [int(i) for i, flag in zip(row.input_ids, row.supervised, strict=True) if flag]
    assert read.input_ids[read.supervised].tolist() == kept
