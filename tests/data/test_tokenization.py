import copy

import pytest
from tokenizers import AddedToken

from dominie.data.assistant_spans import ends_of_turn
from dominie.data.conversations import Conversation
from dominie.data.tokenization import (
    encode_all,
    ends_of_rows,
    tokenizer_fingerprint,
)


def test_the_fingerprint_is_that_of_a_copy_used_otherwise(make_tokenizer, tmp_path):
    tokenizer = copy.deepcopy(make_tokenizer("mistral"))
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "b c"], truncation=True, max_length=1)
    tokenizer.pad_token = tokenizer.eos_token
    assert tokenizer_fingerprint(tokenizer) == before
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert tokenizer_fingerprint(again) == before


def test_what_changes_the_ids_changes_the_fingerprint(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    before = tokenizer_fingerprint(tokenizer)
    changed = copy.deepcopy(tokenizer)
    changed.chat_template += " "
    assert tokenizer_fingerprint(changed) != before
    changed = copy.deepcopy(tokenizer)
    changed.add_tokens([AddedToken("<new>")])
    assert tokenizer_fingerprint(changed) != before
    changed = copy.deepcopy(tokenizer)
    changed.backend_tokenizer.pre_tokenizer = None
    assert tokenizer_fingerprint(changed) != before
    assert tokenizer_fingerprint(make_tokenizer("llama3")) != before


def rows_of(tokenizer, *chats):
    return encode_all(tokenizer, [Conversation(chat) for chat in chats])


USER, ASSISTANT = ({"role": role, "content": "four"} for role in ("user", "assistant"))


def ends(tokenizer, found):
    return tokenizer.convert_ids_to_tokens(found)


def test_the_ends_of_answers_are_those_of_the_rows(make_tokenizer):
    tokenizer = make_tokenizer("harmony")  # within a conversation another token ends a turn
    goes_on = [USER, ASSISTANT, USER, ASSISTANT]
    rows = rows_of(tokenizer, [USER, ASSISTANT], goes_on, [*goes_on, USER])
    assert ends(tokenizer, ends_of_rows(tokenizer, rows)) == ["<|return|>"]
    assert ends_of_rows(tokenizer, []) == []
    plain = rows[0]._replace(supervised=[False] * len(rows[0].supervised))
    assert ends_of_rows(tokenizer, [plain]) == []


@pytest.mark.parametrize(
    ("opening", "expected"),
    [
        ("", ["<|im_end|>"]),
        (
            "{% if messages[0].role != 'system' %}{{ raise_exception('a') }}{% endif %}",
            ["<|im_end|>"],
        ),
        ("{% for tool in tools %}{{ tool.function.name }}{% endfor %}", ["<|im_end|>"]),
        ("{{ raise_exception('whatever it is') }}", []),
    ],
)
def test_the_end_of_a_turn_is_found_if_the_template_renders_anything(
    make_tokenizer, opening, expected
):
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = opening + tokenizer.chat_template
    assert ends(tokenizer, ends_of_turn(tokenizer)) == expected
