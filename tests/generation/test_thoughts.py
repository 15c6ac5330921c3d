"""Thoughts are told from answers under the marks of all families, and answers are left alone."""

import pytest

from dominie.generation.thoughts import begins_thoughts, is_mark, part_thoughts, without_thoughts

PAIRS = [
    ("<think>", "</think>"),
    ("<think>\n", "\n</think>\n\n"),
    ("<thinking>", "</thinking>"),
    ("<thought>\n", "\n</thought>\n"),
    ("<seed:think>", "</seed:think>"),
    ("<longcat_think>\n", "\n</longcat_think>\n"),
    ("<|thinking|>", "<|/thinking|>"),
    ("<|START_THINKING|>", "<|END_THINKING|><|START_RESPONSE|>"),
    ("<|begin_of_thought|>\n", "\n<|end_of_thought|>\n\n<|begin_of_solution|>\n"),
    ("<｜begin▁of▁thinking｜>", "<｜end▁of▁thinking｜>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<unused94>thought\n", "<unused95>"),
    ("<|channel>thought\n", "\n<channel|>"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    ("<|think|>", "<|end|><|begin|>assistant<|content|>"),
    ("analysis", "assistantfinal"),
    ("<reasoning>\n", "\n</reasoning>\n<answer>\n"),
    ("Here is my thought process: ", " Here is my response: "),
    ("Here are my reasoning steps:\n", "\n[BEGIN FINAL RESPONSE]\n"),
]


@pytest.mark.parametrize(("begin", "end"), PAIRS)
def test_thoughts_of_every_family(begin: str, end: str):
    whole = part_thoughts(f"{begin}Perhaps [[3]]? No.{end}It is 7.")
    assert (whole.answer, whole.thoughts) == ("It is 7.", "Perhaps [[3]]? No.")
    assert not whole.unended
    cut = part_thoughts(f"{begin}Perhaps [[3]]? N")
    assert (cut.answer, cut.thoughts, cut.unended) == ("", "Perhaps [[3]]? N", True)


@pytest.mark.parametrize(
    ("begin", "end"), [p for p in PAIRS if p[0] not in ("analysis", "<reasoning>\n")][:15]
)
def test_a_beginning_that_stands_in_the_prompt(begin: str, end: str):
    assert begins_thoughts(f"<|user|>\nHello<|end|>\n<|assistant|>\n{begin}")
    assert not begins_thoughts(f"<|user|>\nHello<|end|>\n<|assistant|>\n{begin}{end}")
    assert without_thoughts(f"Perhaps 3?{end}It is 7.") == "It is 7."
    assert part_thoughts("Perhaps 3? N", begun=True) == part_thoughts(f"{begin}Perhaps 3? N")
    assert without_thoughts(f"Perhaps `{begin.strip()}` 3?{end}It is 7.", begun=True) == "It is 7."


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>\n\n</think>\n\nYes.", "Yes."),
        ("<think></think>Yes.", "Yes."),
        ("<|channel>thought\n<channel|>Yes.", "Yes."),
        ("<think>a <think>b</think> c</think>Yes.", "Yes."),
        ("<think>a</think>Yes. <think>b</think>Indeed.", "Yes. Indeed."),
        ("<think>say `</think>` in the end</think>Yes.", "Yes."),
        ("<think>it is \"Paris\"</think>\"Paris\"", '"Paris"'),
        ("<think>a</think>Write `</think>` then.", "Write `</think>` then."),
        ("<think>\na\n</think>\n\n<answer>Yes.</answer>", "Yes."),
        ("<thinking>a</thinking>\n<output>\nYes.\n</output>", "Yes."),
        ("<think>a</think><|begin_of_box|>Yes.<|end_of_box|>", "Yes."),
        ('<details type="reasoning" done="true">\n> a\n</details>\nYes.', "Yes."),
        ("<think>a</think>", ""),
        ("Yes.\n<think>But is it", "Yes."),
        ("<Think>a</Think>Yes.", "Yes."),
        (
            "<|start|>assistant<|channel|>analysis<|message|>a<|end|><|start|>assistant"
            "<|channel|>commentary<|message|>First. <|end|><|start|>assistant<|channel|>final"
            "<|message|>Yes.<|return|>",
            "First. Yes.",
        ),
    ],
)  # fmt: skip
def test_shapes_of_thoughts(text: str, answer: str):
    assert without_thoughts(text) == answer


@pytest.mark.parametrize(
    "text",
    [
        "",
        " Yes. \n",
        "Analysis of the question shows 7.",
        "analysis assistantfinal",
        "I think so.",
        "The reasoning: <b>7</b>",
        "Open with `<think>` and close with `</think>`.",
        'It writes "<think>" and then "</think>" around them.',
        "```xml\n<think>\na\n</think>\n```\nThat is how.",
        "Use the <think> tag for it.",
        "<answer>7</answer>",
        "List [1, 2] and [THINKING] of it",
        "a <| b |> c",
    ],
)
def test_an_answer_without_thoughts_is_left_to_the_letter(text: str):
    assert part_thoughts(text).answer == text
    assert not part_thoughts(text).unended


def test_special_tokens_that_are_marks():
    assert all(
        map(is_mark, ("<think>", "[/THINK]", "<|channel|>", "<channel|>", "<|END_THINKING|>"))
    )
    assert not any(map(is_mark, ("<|im_end|>", "</s>", "<pad>", "<|endoftext|>", "[INST]")))


def test_hostile_texts_take_little_time():
    for text in ("<think>" * 50_000, "<" * 200_000, "<|channel|>a" * 20_000, "analysisA" * 20_000):
        part_thoughts(text)
        part_thoughts(text + "</think>")
