"""The length-controlled model: its optimum, what it controls for, and scikit-learn beside it."""

import numpy as np
import pytest

from dominie.judge.length_control import Gamed, _fitted, _losses, length_controlled


def drawn(n=400, seed=0, bias=0.4, effect=-1.5):
    """Preferences that follow the model's own assumptions."""
    random = np.random.default_rng(seed)
    lengths = random.integers(50, 4000, size=(n, 2))
    difference = lengths[:, 0] - lengths[:, 1]
    difficulty = random.normal(size=n)
    scores = effect * np.tanh(difference / difference.std(ddof=1)) + 0.5 * difficulty + bias
    return 1 / (1 + np.exp(-scores)), [tuple(pair) for pair in lengths.tolist()], difficulty


@pytest.mark.parametrize("strength", [1e-3, 0.05, 1.0, 1e4])
def test_the_fit_is_the_minimum(strength):
    preferences, lengths, difficulty = drawn(60)
    difference = np.array([a - b for a, b in lengths])
    rows = np.stack([np.tanh(difference / 1000), difficulty, np.ones(60)], axis=1)
    weights = np.linspace(0.1, 1, 60)
    beta = _fitted(rows, preferences, weights, strength, np.zeros(3))

    def objective(at):
        return np.abs(at).sum() + strength * _losses(rows @ at, preferences, weights).sum()

    best, random = objective(beta), np.random.default_rng(1)
    for scale in (1e-4, 1e-2, 1.0):
        for _ in range(200):
            assert objective(beta + scale * random.normal(size=3)) >= best - 1e-10


def test_length_is_controlled_for():
    preferences, lengths, difficulty = drawn()
    longer = [(a, b + 3000) for a, b in lengths]  # the same quality, more words
    difference = np.array([a - b for a, b in longer], dtype=float)
    scores = -1.5 * np.tanh(difference / difference.std(ddof=1)) + 0.5 * difficulty + 0.4
    swollen = 1 / (1 + np.exp(-scores))
    assert swollen.mean() > preferences.mean() + 0.1
    plain = length_controlled(preferences.tolist(), lengths, difficulty=difficulty.tolist())
    told = length_controlled(swollen.tolist(), longer, difficulty=difficulty.tolist())
    truth = (1 / (1 + np.exp(-(0.5 * difficulty + 0.4)))).mean()
    assert plain.win_rate == pytest.approx(truth, abs=0.005)
    assert told.win_rate == pytest.approx(truth, abs=0.02)
    assert told.length_effect < -1


def test_the_standard_error_is_that_of_repetition():
    probabilities, lengths, _ = drawn(300)
    random = np.random.default_rng(5)
    rates, errors = [], []
    for _ in range(40):
        votes = (random.random(300) < probabilities).astype(float)
        told = length_controlled(votes.tolist(), lengths)
        rates.append(told.win_rate)
        errors.append(told.standard_error)
    assert np.mean(errors) == pytest.approx(np.std(rates, ddof=1), rel=0.35)


def test_edges():
    assert length_controlled([1.0] * 5, [(3, 3)] * 5).win_rate > 0.9
    assert length_controlled([0.7], [(1, 2)]).win_rate >= 0.5
    with_null = length_controlled([1.0, None, 0.0, 1.0], [(1, 2), (3, 9), (4, 1), (2, 2)])
    assert 0 < with_null.win_rate < 1
    with pytest.raises(ValueError, match="no preference"):
        length_controlled([None], [(1, 2)])


@pytest.mark.full
@pytest.mark.parametrize("with_gamed", [False, True])
def test_scikit_learn_as_upstream_calls_it_comes_to_the_same(with_gamed):
    linear_model = pytest.importorskip("sklearn.linear_model")
    preferences, lengths, difficulty = drawn(500, seed=3)
    random = np.random.default_rng(4)
    votes = np.clip(preferences + random.normal(scale=0.2, size=500), 0, 1)
    difference = np.array([a - b for a, b in lengths], dtype=float)
    difference /= difference.std(ddof=1)
    rows = np.stack([np.tanh(difference), difficulty, np.ones(500)], axis=1)
    wanted, weights, gamed = votes, np.ones(500), None
    if with_gamed:
        gamed = Gamed(random.random(200), random.normal(size=200), random.normal(size=200))
        theirs = np.stack([np.tanh(gamed.difference), gamed.difficulty, np.zeros(200)], axis=1)
        rows = np.concatenate([theirs, rows])
        wanted = np.concatenate([gamed.preference, wanted])
        weights = np.concatenate([np.full(200, 0.1), weights])
    told = length_controlled(votes.tolist(), lengths, difficulty=difficulty.tolist(), gamed=gamed)

    def fit(strength, kept):
        """Every row once as a win, weighted by its preference, and once as a loss."""
        model = linear_model.LogisticRegression(
            C=strength,
            solver="liblinear",
            fit_intercept=False,
            tol=1e-8,
            max_iter=10_000,
            **_l1(linear_model),
        )
        shares = np.concatenate([wanted[kept] * weights[kept], (1 - wanted[kept]) * weights[kept]])
        labels = np.repeat([1, 0], kept.sum())
        return model.fit(np.concatenate([rows[kept]] * 2), labels, sample_weight=shares)

    def score(strength):
        """The mean over folds of the weighted log likelihood of held-out preferences."""
        fold, found = np.arange(len(rows))[::-1] % 5, []
        for held_out in range(5):
            test = fold == held_out
            p = fit(strength, ~test).predict_proba(rows[test])[:, 1]
            likelihood = wanted[test] * np.log(p) + (1 - wanted[test]) * np.log(1 - p)
            found.append((likelihood * weights[test]).mean())
        return np.mean(found)

    assert told.strength == max(np.logspace(-4, 4, 10), key=score)
    model = fit(told.strength, np.ones(len(rows), dtype=bool))
    equal = np.stack([np.zeros(500), difficulty, np.ones(500)], axis=1)
    assert told.win_rate == pytest.approx(model.predict_proba(equal)[:, 1].mean(), abs=1e-4)
    assert told.length_effect == pytest.approx(model.coef_[0][0], abs=1e-3)


def _l1(linear_model):
    """How this version of scikit-learn is asked for an L1 penalty."""
    import inspect

    parameters = inspect.signature(linear_model.LogisticRegression).parameters
    default = parameters["penalty"].default
    return {"penalty": "l1"} if default == "l2" else {"l1_ratio": 1.0}
