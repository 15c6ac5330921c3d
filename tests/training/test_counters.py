"""Products counted by the trainer are those that a person counts by hand."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig
from transformers.models.mistral import MistralForCausalLM

from dominie.core import hardware as devices
from dominie.data.batch import collate
from dominie.data.tokenization import Encoded
from dominie.losses.terms import LossTerms, NextToken, Prediction
from dominie.models.adapters import with_lora
from dominie.models.info import Workload, model_flops
from dominie.planning.sizes import shipped_config
from dominie.teachers import LocalTeacher, RoutedTeacher
from dominie.training.counters import FlopsMeter, peak_flops
from dominie.training.settings import Lora

# Of the tiny student: width 16, 4 heads of 4, 2 of keys, an inner width of 24, 2 layers, 61 tokens.
LAYER = 16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 24
HEAD, HEADS = 61 * 16, 16


def conversation(length: int, answer: int) -> Encoded:
    return Encoded([1] * length, [False] * (length - answer) + [True] * answer)


def by_hand(tokens: int, supervised: int, keys: int, layer: int = LAYER) -> int:
    """Operations of a forward pass."""
    return 2 * (2 * layer * tokens + HEAD * supervised) + 2 * 4 * HEADS * keys


@pytest.mark.parametrize("pack_to", [None, 40])
def test_a_batch_of_a_tiny_model_and_its_teacher(student, teacher_model, pack_to):
    rows = [(0, conversation(5, 2)), (1, conversation(3, 1)), (0, conversation(2, 1))]
    batch = collate(rows, routes=[0, 1], pack_to=pack_to)
    used = FlopsMeter(model_flops(student), [None, model_flops(teacher_model)], peak=1e6)
    loads = used.loads(batch)
    assert loads.tolist() == [[7, 3, 15 + 3], [3, 1, 6]]
    # Of the mixture a token meets two of three experts, and the router.
    experts = LAYER + 3 * 16 * 24 + 3 * 16
    hand = 3 * by_hand(10, 4, 24) + by_hand(3, 1, 6, experts)
    assert used.flops(loads) == pytest.approx(hand, rel=1e-12)
    told = used.log_entry(hand, 2.0, processes=4)
    assert told == {
        "flops_per_second": pytest.approx(hand / 2, rel=1e-3),
        "mfu": round(hand / 8e6, 4),
    }


def test_windows_adapters_and_frozen_weights(student):
    windowed = MistralConfig(**{**student.config.to_dict(), "sliding_window": 4})
    batch = collate([(0, conversation(6, 1))])
    used = FlopsMeter(model_flops(MistralForCausalLM(windowed)), [None], peak=None)
    assert used.loads(batch).tolist() == [[6, 1, 1 + 2 + 3 + 4 + 4 + 4]]
    assert "mfu" not in used.log_entry(1.0, 1.0, 1)

    adapted = with_lora(student, Lora(r=2, target_modules=["q_proj"]), where="here")
    found, adapters = model_flops(adapted), 2 * (2 * 16 + 2 * 16)
    assert (found.frozen, found.trained, found.head) == (2 * LAYER, adapters, HEAD)
    assert model_flops(adapted, adapters=False).trained == 0
    load = Workload(tokens=10, supervised=4, keys={None: 24})
    hand = 4 * (2 * LAYER * 10 + HEAD * 4) + 6 * adapters * 10 + 3 * 2 * 4 * HEADS * 24
    assert found.training(load) == hand


def test_the_papers_student():
    """Mistral-7B: 32 layers of width 4096, 8 of 32 heads for keys, an inner width of 14336."""
    config = AutoConfig.from_pretrained(shipped_config("mistralai/Mistral-7B-v0.1"))
    with torch.device("meta"):
        found = model_flops(AutoModelForCausalLM.from_config(config))
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    assert (found.trained, found.head) == (32 * layer, 32000 * 4096)
    keys = 2048 * 2049 // 2
    load = Workload(tokens=2048, supervised=2048, keys={4096: keys})
    hand = 6 * 2048 * (32 * layer + 32000 * 4096) + 12 * 32 * 4096 * keys
    assert found.training(load) == hand


def test_lines_of_metrics_have_the_rate(student, teacher_model, step_gradient, tmp_path):
    rows = [[conversation(5, 2), conversation(3, 1)]]
    teacher = RoutedTeacher({"t": LocalTeacher(teacher_model)}, ["t"])
    terms = LossTerms(next_token=NextToken(), prediction=Prediction())
    step_gradient(student, rows, [terms], teacher=teacher, micro_batch=1)
    (line,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    used = line["throughput"]
    assert "mfu" not in used, "nothing is known of a CPU's peak"
    seconds = 8 / used["tokens_per_second"]
    hand = 3 * by_hand(8, 3, 15 + 6)  # the fixture counts the student alone
    assert used["flops_per_second"] * seconds == pytest.approx(hand, rel=1e-3)


def test_the_peak_is_that_of_the_gpu_and_the_precision(monkeypatch):
    assert torch.cuda.is_available() or peak_flops("bf16") is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for words, gpu in {"NVIDIA H200": "h200", "NVIDIA A100-SXM4-80GB": "a100"}.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda words=words: words)
        found = devices.GPUS[gpu]
        assert (peak_flops("bf16"), peak_flops("fp32")) == (found.half, found.single)
    for words in ("NVIDIA T4", "NVIDIA L40", "NVIDIA A10G"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda words=words: words)
        assert peak_flops("bf16") is None, words
