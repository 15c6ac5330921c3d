import copy

from tokenizers import AddedToken

from dominie.data.tokenization import tokenizer_fingerprint


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
