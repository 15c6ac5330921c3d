"""The pool: the rarest ids, with the teacher's average over them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dominie.teachers.cache_codec import Coder
from dominie.teachers.cache_sampling import CacheSettings, TokenStats, choose, load_token_stats
from dominie.teachers.cache_writer import fidelity
from dominie.teachers.cached import target_of


@pytest.fixture
def vocabulary() -> TokenStats:
    generator = np.random.default_rng(0)
    ids = generator.permutation(50)
    tails = np.empty(50, np.float32)
    tails[ids] = 0.5 / np.arange(1, 51) ** 1.5
    return TokenStats(ids, tails, pooled=0.1)


def test_the_pool_is_the_rarest_ids_of_so_much_mass(vocabulary):
    pool = vocabulary.is_pooled
    count = int(pool.sum())
    assert set(np.flatnonzero(pool)) == set(vocabulary.ids[-count:])
    share = vocabulary.tails[pool].sum() / vocabulary.tails.sum()
    assert 0.05 < share <= 0.1
    shape = vocabulary.pool_shape
    assert shape.sum() == pytest.approx(1, abs=1e-6)
    assert (shape[~pool] == 0).all()
    np.testing.assert_allclose(
        shape[pool], vocabulary.tails[pool] / vocabulary.tails[pool].sum(), 1e-4
    )


@pytest.mark.parametrize("change", [{"pooled": 0.0}, {"tails": np.zeros(50, np.float32)}])
def test_nothing_pooled(vocabulary, change):
    parts = {"ids": vocabulary.ids, "tails": vocabulary.tails, "pooled": 0.1, **change}
    assert TokenStats(**parts).is_pooled is None
    assert TokenStats(**parts).pool_shape is None


def test_it_is_read_as_it_was_written(vocabulary, tmp_path):
    name = vocabulary.save(tmp_path / "made")
    (tmp_path / "made").rename(tmp_path / f"{name}.npy")
    again = load_token_stats(tmp_path / f"{name}.npy", 50, 0.1)
    np.testing.assert_array_equal(again.ids, vocabulary.ids)
    np.testing.assert_array_equal(again.tails, vocabulary.tails)
    with pytest.raises(ValueError, match="ids of the vocabulary"):
        load_token_stats(tmp_path / f"{name}.npy", 51, 0.1)


def test_a_pools_mass_is_kept_and_its_ids_are_not_drawn(vocabulary):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(40, 50, generator=generator, dtype=torch.float64)
    logits += torch.from_numpy(np.log(vocabulary.tails)).double()
    settings = CacheSettings(threshold=0.1)
    pool = torch.from_numpy(vocabulary.is_pooled)
    draws = torch.from_numpy(settings.draws(40, np.random.default_rng(0))).double()
    chosen = choose(logits, settings, draws, pool)
    p = logits.softmax(-1)
    assert not pool[chosen.sample_ids].any()
    wanted = (p * (pool & (p < 0.1))).sum(-1)
    np.testing.assert_allclose(chosen.pooled, wanted, rtol=1e-9)
    coder = Coder.of(vocabulary, settings)
    said = coder.decoded(coder.encoded(chosen, b""), b"")
    target = target_of([said], torch.device("cpu"), vocabulary.pool_shape)
    total = target.probabilities.sum(-1) + target.pool[1]
    torch.testing.assert_close(total, torch.ones(40))
    np.testing.assert_allclose(target.pool[1], wanted, rtol=0.05, atol=1e-4)
    entropy = -(p * p.log()).sum(-1)
    np.testing.assert_allclose(target.teacher_entropy, entropy, atol=0.08)
    assert fidelity(target, logits).missing_mass < 1 - float(p.max(-1).values.mean())
