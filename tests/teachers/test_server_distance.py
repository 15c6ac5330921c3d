"""How far a server is from the same weights here."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import tiny_folder

from dominie.generation.prompt_scores import PromptScores
from dominie.models.loading import load_frozen
from dominie.models.spec import Model
from dominie.teachers.cache_writer import distance


@pytest.mark.parametrize("k", [3, 61])
def test_the_distance_is_none_from_its_own_weights_alone(tmp_path, k):
    folder = str(tiny_folder(tmp_path / "tiny", "llama"))
    ids = np.random.default_rng(0).integers(0, 61, 20).tolist()
    model = load_frozen(Model(path=folder), device=torch.device("cpu"))
    with torch.no_grad():
        log_p = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1).numpy()

    def scores(log_p: np.ndarray) -> PromptScores:
        order = np.argsort(-log_p, axis=1)[:, :k]
        return PromptScores(
            np.full(len(log_p), k),
            order.ravel(),
            np.take_along_axis(log_p, order, 1).ravel(),
            log_p[np.arange(19), ids[1:]],
        )

    row = SimpleNamespace(input_ids=np.array(ids, np.int32), supervised=np.ones(20, bool))
    own = distance(model, row, scores(log_p), 61)
    assert own["kl"] == pytest.approx(0, abs=1e-5)
    assert own["difference_mean"] == pytest.approx(0, abs=1e-4)
    late = distance(model, row, scores(np.roll(log_p, 1, axis=0)), 61)
    assert late["kl"] > 0.05
    assert late["difference_mean"] > 0.05
