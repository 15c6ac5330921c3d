"""Arguments that do not fit are refused by name, before anything is computed."""

from __future__ import annotations

import pytest
import torch

from dominie.losses import Head, SparseTarget, vocabulary_losses

HIDDEN, WEIGHT = torch.randn(4, 3), torch.randn(6, 3)
TEACHER = torch.randn(4, 2), torch.randn(6, 2)
LABELS = torch.tensor([0, 5, -100, 2])
SPARSE = SparseTarget(torch.zeros(4, 1).long(), torch.ones(4, 1), torch.zeros(4))


def with_value(tensor, value):
    changed = tensor.clone()
    changed.view(-1)[1] = value
    return changed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature is a finite number above 0, found 0.0"),
        ({"temperature": float("nan")}, "temperature"),
        ({"kind": "forward"}, "kind is one of forward_kl, .*found 'forward'"),
        ({"kind": "jsd", "beta": 1.0}, "beta of jsd is between 0 and 1"),
        ({"backend": "cuda"}, "backend is one of auto, torch, triton"),
        ({"hidden": torch.randn(4, 2)}, "hidden has width 2, .* expects 3"),
        ({"hidden": torch.randn(2, 2, 3)}, r"hidden is a floating-point \[N, D\]"),
        ({"head": torch.randn(3)}, r"weight is \[V, D\]"),
        ({"target": None, "labels": None}, "neither a target nor labels"),
        ({"target": (TEACHER[0], torch.randn(6, 3))}, "the target's hidden has width 2"),
        ({"target": (TEACHER[0][:2], TEACHER[1])}, "the target has 2 tokens, hidden has 4"),
        ({"target": SPARSE, "kind": "jsd"}, "a sparse target has no jsd"),
        ({"labels": LABELS[:3]}, r"labels are int64 \[N\] = \[4\]"),
        ({"labels": LABELS.float()}, "labels are int64"),
        ({"divergence_weights": torch.ones(3)}, r"divergence_weights are \[N\] = \[4\], found"),
        ({"label_weights": torch.ones(4, 1)}, "label_weights are"),
        ({"target": None, "divergence_weights": torch.ones(4)}, "nothing for them to weight"),
        ({"labels": None, "label_weights": torch.ones(4)}, "nothing for them to weight"),
        ({"hidden": with_value(HIDDEN, torch.nan)}, "^hidden has values that are not finite"),
        (
            {"hidden": with_value(HIDDEN, torch.inf), "head": Head(WEIGHT, softcap=5.0)},
            "^hidden has values that are not finite",
        ),
        (
            {"target": (with_value(TEACHER[0], -torch.inf), TEACHER[1])},
            "the target's hidden has values that are not finite",
        ),
        (
            {"target": SparseTarget(SPARSE.ids + 6, SPARSE.probabilities, SPARSE.tail)},
            r"ids outside \[0, 6\)",
        ),
        (
            {"target": SparseTarget(SPARSE.ids, SPARSE.probabilities * torch.nan, SPARSE.tail)},
            "probabilities that are not finite",
        ),
        ({"labels": with_value(LABELS, 6)}, r"labels are in \[0, 6\) or -100"),
        ({"labels": with_value(LABELS, -1)}, "labels are in"),
    ],
)
def test_refused(changes, message):
    arguments = {"hidden": HIDDEN, "head": WEIGHT, "target": TEACHER, "labels": LABELS} | changes
    with pytest.raises(ValueError, match=message):
        vocabulary_losses(**arguments)


def test_triton_says_why_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend triton cannot run here: the tensors are on cpu"):
        vocabulary_losses(HIDDEN, WEIGHT, TEACHER, backend="triton")


def test_triton_is_refused_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr("dominie.losses.arguments.find_spec", lambda _: None)
    with pytest.raises(ValueError, match="triton is not installed"):
        vocabulary_losses(HIDDEN, WEIGHT, TEACHER, backend="triton")
    vocabulary_losses(HIDDEN, WEIGHT, TEACHER)


def test_a_sparse_target_is_scored_by_every_backend(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    losses = [
        vocabulary_losses(HIDDEN, WEIGHT, SPARSE, backend=name).divergence
        for name in ("auto", "torch", "triton")
    ]
    assert losses[0] == losses[1] == losses[2]
