"""A conversation's stored probabilities as bytes: whole, small, and refused when touched."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dominie.teachers.cache_codec import Coder, Damaged, _packed, _Reader
from dominie.teachers.cache_sampling import CacheSettings, choose
from dominie.teachers.cached import target_of

numbers = st.lists(st.integers(0, 2**40), max_size=60).map(lambda x: np.array(x, np.int64))
small = st.lists(st.integers(0, 9), max_size=60).map(lambda x: np.array(x, np.int64))


@given(st.lists(numbers | small, max_size=8))
def test_arrays_are_read_as_they_were_written(arrays):
    reader = _Reader(_packed(*arrays))
    for array in arrays:
        np.testing.assert_array_equal(reader.next(len(array)), array)
    assert reader.at_end


def read(data: bytes, *counts: int) -> list[np.ndarray]:
    reader = _Reader(data)
    return [reader.next(count) for count in counts]


@given(numbers.filter(len), st.integers(0, 400))
def test_an_array_that_is_cut_off_is_refused(array, cut):
    written = _packed(array, array)
    with pytest.raises(Damaged):
        read(written[: min(cut, len(written) - 1)], len(array), len(array))


@pytest.mark.parametrize("count", [-1, 50, 2**40])
def test_an_array_of_another_length_is_refused(count):
    with pytest.raises(Damaged):
        read(_packed(np.array([1, 2, 3])), count)


def test_geometric_numbers_take_about_their_entropy():
    p = 1 / 50
    values = np.random.default_rng(0).geometric(p, 4000) - 1
    entropy = -(p * np.log2(p) + (1 - p) * np.log2(1 - p)) / p
    assert 8 * len(_packed(values)) / len(values) < 1.05 * entropy
    assert len(_packed(np.full(1000, 50))) < 16, "equal numbers take no room"


KEY = b"0123456789abcdef"
SCHEMES = [
    CacheSettings(threshold=0.05),
    CacheSettings(scheme="sampled", samples=7),
    CacheSettings(scheme="top", top_p=0.9, k_max=5),
]


def logits_of(seed: int, tokens: int, vocabulary: int, sharpness: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64) * sharpness


def stored(logits: torch.Tensor, options: CacheSettings, seed: int = 0):
    draws = options.draws(len(logits), np.random.default_rng(seed))
    return choose(logits, options, torch.from_numpy(draws).double())


def coder_of(options: CacheSettings, vocabulary: int) -> Coder:
    ids = np.random.default_rng(1).permutation(vocabulary)
    return Coder(ids, options.levels, options.scheme == "top")


@given(
    st.integers(0, 10**6),
    st.integers(1, 12),
    st.integers(2, 40),
    st.floats(0, 30),
    st.sampled_from(SCHEMES),
)
@settings(deadline=None)
def test_what_is_stored_comes_back(seed, tokens, vocabulary, sharpness, options):
    chosen = stored(logits_of(seed, tokens, vocabulary, sharpness), options)
    coder = coder_of(options, vocabulary)
    said = coder.decoded(coder.encoded(chosen, KEY), KEY)
    target = target_of([said], torch.device("cpu"))
    p = target.probabilities.double()
    tail = 0 if target.tail is None else target.tail
    torch.testing.assert_close(p.sum(-1) + tail, torch.ones(tokens, dtype=torch.float64))
    heads = np.split(chosen.head_ids, np.cumsum(chosen.heads)[:-1])
    samples = np.split(chosen.sample_ids, np.cumsum(chosen.samples)[:-1])
    for row, ids in enumerate(target.ids.tolist()):
        found = [i for i in ids if i >= 0]
        assert len(set(found)) == len(found)
        assert set(found) == {*heads[row], *samples[row]}
    wanted = np.zeros((tokens, vocabulary))
    owner = np.repeat(np.arange(tokens), chosen.heads)
    wanted[owner, chosen.head_ids] = chosen.head_probabilities
    owner = np.repeat(np.arange(tokens), chosen.samples)
    weights = chosen.tail / np.maximum(chosen.samples, 1)
    np.add.at(wanted, (owner, chosen.sample_ids), weights[owner])
    got = np.zeros((tokens, vocabulary))
    np.add.at(got, (said.token, said.ids), said.probabilities)
    # Half a step of the logarithm, and as much again from scaling to a sum of 1.
    np.testing.assert_allclose(got, wanted, rtol=1.1 / options.levels, atol=1e-6)


@pytest.mark.parametrize("options", SCHEMES)
def test_finer_levels_store_it_exactly(options):
    options = CacheSettings(**{**options.identity, "levels": 10**7})
    logits = logits_of(0, 5, 20)
    coder = coder_of(options, 20)
    chosen = stored(logits, options)
    said = coder.decoded(coder.encoded(chosen, KEY), KEY)
    for row in range(5):
        mine = dict(
            zip(said.ids[said.token == row], said.probabilities[said.token == row], strict=True)
        )
        p = logits[row].softmax(-1)
        heads = np.repeat(np.arange(5), chosen.heads) == row
        for id_ in chosen.head_ids[heads]:
            assert mine[id_] == pytest.approx(float(p[id_]), rel=1e-6)


@pytest.mark.parametrize("options", SCHEMES)
def test_the_teachers_entropy_is_kept_beside_samples(options):
    logits = logits_of(3, 30, 50)
    coder = coder_of(options, 50)
    said = coder.decoded(coder.encoded(stored(logits, options), KEY), KEY)
    if options.scheme == "top":
        assert said.entropy is None
        assert said.tail is not None
        return
    p = logits.softmax(-1)
    wanted = -(p * p.log()).sum(-1)
    assert said.tail is None
    np.testing.assert_allclose(said.entropy, wanted, atol=0.08)


@pytest.mark.parametrize("options", SCHEMES)
def test_every_flipped_bit_and_every_cut_is_refused(options):
    coder = coder_of(options, 30)
    code = coder.encoded(stored(logits_of(0, 4, 30), options), KEY)
    for place in range(len(code)):
        for bit in range(8):
            broken = bytearray(code)
            broken[place] ^= 1 << bit
            with pytest.raises(Damaged):
                coder.decoded(bytes(broken), KEY)
        with pytest.raises(Damaged):
            coder.decoded(code[:place], KEY)
    with pytest.raises(Damaged):
        coder.decoded(code + b"\0", KEY)
    with pytest.raises(Damaged):
        coder.decoded(code, b"another key 0123")


@given(st.binary(max_size=80))
def test_bytes_of_anyones_making_are_refused_or_sensible(body):
    """Even under the right checksum, nothing but `Damaged` is raised and no id is out of range."""
    coder = coder_of(SCHEMES[0], 30)
    code = zlib.crc32(body, zlib.crc32(KEY)).to_bytes(4, "little") + body
    try:
        said = coder.decoded(code, KEY)
    except Damaged:
        return
    assert ((said.ids >= 0) & (said.ids < 30)).all()
    assert np.isfinite(said.probabilities).all()


def test_a_smaller_set_of_common_ids_takes_fewer_bytes():
    vocabulary, tokens = 4096, 64
    common = -1.2 * torch.log(torch.arange(1, vocabulary + 1.0))
    logits = common + torch.randn(tokens, vocabulary) * 0.5
    options = CacheSettings(threshold=0.01)
    chosen = stored(logits, options)
    by_rank = Coder(np.arange(vocabulary), options.levels, bucket=False)
    shuffled = coder_of(options, vocabulary)
    assert len(by_rank.encoded(chosen, KEY)) < 0.9 * len(shuffled.encoded(chosen, KEY))


@pytest.mark.parametrize("vocabulary", [83, 110, 1500])
def test_entropies_that_are_all_alike_are_right_on_average(vocabulary):
    """Rounded to the nearest step, all of a flat teacher's would be off by the same part of it."""
    options = CacheSettings(threshold=0.05)
    logits = logits_of(3, 4000, vocabulary, sharpness=0.01)
    chosen, coder = stored(logits, options), coder_of(options, vocabulary)
    code = coder.encoded(chosen, KEY)
    assert code == coder.encoded(chosen, KEY), "written again, it is the same"
    p = logits.softmax(-1)
    exact = -torch.xlogy(p, p).sum(-1).numpy()
    found = coder.decoded(code, KEY).entropy
    assert np.abs(found - exact).max() < 1.1 / 16 + 1 / options.levels
    assert abs(float((found - exact).mean())) < 0.002
