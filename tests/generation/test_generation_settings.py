"""A model's generation_config.json is somebody's: what counts of it has to be tokens."""

import pytest
import torch
from tiny import tiny_model
from transformers import GenerationConfig

from dominie.core.errors import InputError
from dominie.generation.local import configured_stops, plain_decoding


@pytest.mark.parametrize(
    "fields",
    [
        {"eos_token_id": "</s>"},
        {"eos_token_id": [[2]]},
        {"eos_token_id": {"id": 2}},
        {"eos_token_id": 2**63},
        {"suppress_tokens": 7},
        {"begin_suppress_tokens": [True]},
        {"bad_words_ids": [7]},
        {"bad_words_ids": [[]]},
        {"bad_words_ids": [[10**6]]},
    ],
)
def test_fields_that_are_no_tokens_are_refused_by_name(fields):
    model = tiny_model()
    for name, value in fields.items():
        setattr(model.generation_config, name, value)
    for use in (configured_stops, lambda model: plain_decoding(model).__enter__()):
        with pytest.raises(InputError, match="name tokens that are none") as refused:
            use(model)
        assert refused.value.expected.startswith(next(iter(fields)))


def test_those_that_are_count():
    model = tiny_model()
    model.generation_config = GenerationConfig(eos_token_id=[2, 3], bad_words_ids=[[4], [5, 6]])
    assert configured_stops(model) == {2, 3}
    with plain_decoding(model):
        assert model.generation_config.bad_words_ids == [[4], [5, 6]]


@pytest.mark.parametrize(("device", "on"), [("cpu", True), ("cuda", False)])
def test_cudnn_attends_no_answer_on_a_gpu_and_is_back_afterwards(device, on, monkeypatch):
    model, enabled = tiny_model(), torch.backends.cuda.cudnn_sdp_enabled
    monkeypatch.setattr(type(model), "device", torch.device(device))
    assert enabled()
    with pytest.raises(MemoryError), plain_decoding(model):  # noqa: PT012
        assert enabled() is on
        raise MemoryError
    assert enabled()
