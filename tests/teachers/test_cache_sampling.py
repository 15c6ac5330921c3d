"""What is stored of a distribution: unbiased samples, or its likeliest tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dominie.teachers.cache_sampling import CacheSettings, choose, joined


@pytest.fixture
def logits() -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(3, 40, generator=generator, dtype=torch.float64) * 1.5


def dense(chosen, vocabulary: int) -> np.ndarray:
    found = np.zeros((len(chosen), vocabulary))
    token = np.repeat(np.arange(len(chosen)), chosen.heads)
    found[token, chosen.head_ids] = chosen.head_probabilities
    token = np.repeat(np.arange(len(chosen)), chosen.samples)
    np.add.at(found, (token, chosen.sample_ids), (chosen.tail / chosen.samples.clip(1))[token])
    return found


def sampled(logits, options: CacheSettings, seed: int):
    draws = torch.from_numpy(options.draws(len(logits), np.random.default_rng(seed))).double()
    return choose(logits, options, draws)


@pytest.mark.parametrize(
    "options", [CacheSettings(threshold=0.04), CacheSettings(scheme="sampled", samples=20)]
)
def test_samples_are_unbiased(logits, options):
    p = logits.softmax(-1).numpy()
    found = np.stack([dense(sampled(logits, options, seed), 40) for seed in range(4000)])
    error = found.std(0) / np.sqrt(len(found)) + 1e-9
    assert (np.abs(found.mean(0) - p) / error).max() < 5  # 120 places, normal to 5 deviations
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-6)


def test_at_as_many_ids_a_threshold_varies_less_than_plain_samples(logits):
    p = logits.softmax(-1).numpy()
    ids, errors = [], []
    for options in (CacheSettings(threshold=0.06), CacheSettings(scheme="sampled", samples=24)):
        found = np.stack([dense(sampled(logits, options, seed), 40) for seed in range(300)])
        ids.append((found > 0).sum(-1).mean())
        errors.append(((found - p) ** 2).sum(-1).mean())
    assert ids[0] < 1.1 * ids[1]
    assert errors[0] < 0.5 * errors[1]


def test_no_sample_weighs_more_than_the_threshold(logits):
    options = CacheSettings(threshold=0.03)
    chosen = sampled(logits, options, 0)
    assert (chosen.tail / chosen.samples <= 0.03 + 1e-12).all()
    assert (chosen.head_probabilities >= 0.03).all()


def test_a_sure_teacher_needs_no_samples():
    logits = torch.full((2, 9), -40.0)
    logits[:, 3] = 0
    chosen = sampled(logits, CacheSettings(), 0)
    assert chosen.heads.tolist() == [1, 1]
    assert chosen.samples.tolist() == [0, 0]


@pytest.mark.parametrize(("top_p", "k_max"), [(0.5, 40), (0.9, 40), (0.9, 3), (1.0, 40), (1.0, 64)])
def test_the_fewest_tokens_that_reach_the_mass(logits, top_p, k_max):
    chosen = sampled(logits, CacheSettings(scheme="top", top_p=top_p, k_max=k_max), 0)
    p = logits.softmax(-1).sort(-1, descending=True).values
    for row, count in enumerate(chosen.heads):
        assert count == min(int((p[row].cumsum(-1) < top_p - 1e-12).sum()) + 1, k_max, 40)
        assert chosen.tail[row] == pytest.approx(float(p[row, count:].sum()), abs=1e-12)


def test_conversations_are_taken_apart_and_put_together(logits):
    chosen = sampled(logits, CacheSettings(threshold=0.05), 0)
    parts = chosen.split(np.array([1, 0, 2]))
    assert [len(part) for part in parts] == [1, 0, 2]
    again = joined(parts)
    for name in chosen.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(again, name), getattr(chosen, name))


@pytest.mark.parametrize(
    "options",
    [
        {"scheme": "best"},
        {"threshold": 0.0},
        {"threshold": 1.0},
        {"samples": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"k_max": 0},
        {"levels": 0},
        {"folder": " "},
    ],
)
def test_settings_that_mean_nothing_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        CacheSettings(**options)
