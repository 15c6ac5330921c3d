"""The C library's heap, simulated: what is freed and not returned."""

from __future__ import annotations

from transformers import MistralConfig

from dominie.planning.trace import ALIGNING, Heap, Pass, traced
from dominie.training.settings import Lora


def test_a_hole_takes_what_is_smaller_and_not_what_left_it():
    heap = Heap()
    place = heap.take(1000)
    assert heap.take(10) == 1000  # something that stays
    heap.give(place, 1000)
    assert heap.take(1000) == 1010
    assert heap.take(1000 - ALIGNING) == place
    assert heap.take(ALIGNING) == heap.top - ALIGNING  # no room in what is left of the hole
    assert heap.top == 2010 + ALIGNING


def test_the_smallest_hole_that_is_large_enough_is_taken():
    heap = Heap()
    places = [heap.take(size) for size in (900, 10, 500, 10, 700)]
    for place, size in zip(places[::2], (900, 500, 700), strict=True):
        heap.give(place, size)
    assert heap.take(550) == places[4]
    assert heap.top == 2120


def test_adapters_leave_more_holes_than_weights_that_are_trained():
    config = MistralConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    full, adapted = (
        traced(config, Pass(2, 128, "fp32", trained=True, lora=lora)) for lora in (None, Lora(r=4))
    )
    assert 0 < full.holes < 0.7 * full.activations
    assert adapted.holes > 2 * full.holes
    assert traced(config, Pass(2, 128, "fp32")).holes == 0
