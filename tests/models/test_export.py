"""What is added to the folder of a model for those who load it."""

import json

from dominie.models.export import prepare_export

from dominie.toyworld.toy_models import word_tokenizer


def test_a_model_stops_where_its_template_ends_an_answer(tmp_path):
    tokenizer = word_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    for config, settings, expected in (
        ({"use_cache": False, "eos_token_id": 7}, {}, [7, end]),
        ({}, {"eos_token_id": [8, 9], "temperature": 0.5}, [8, 9, end]),
        ({}, {"eos_token_id": end}, end),
        (None, None, end),  # an adapter
    ):
        for name, value in (("config.json", config), ("generation_config.json", settings)):
            (tmp_path / name).unlink(missing_ok=True)
            if value:
                (tmp_path / name).write_text(json.dumps(value))
        prepare_export(tmp_path, tokenizer)
        made = json.loads((tmp_path / "generation_config.json").read_text())
        assert made["eos_token_id"] == expected
        assert made["pad_token_id"] == tokenizer.pad_token_id
        assert made.get("temperature") == (settings or {}).get("temperature")
        if config:
            assert json.loads((tmp_path / "config.json").read_text())["use_cache"] is True
