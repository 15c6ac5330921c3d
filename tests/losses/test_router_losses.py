"""Load balancing and z-loss against a naive float64 oracle: values, gradients, layouts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dominie.losses.router_losses import Conversations, Routing, router_loss, routing_sums

LENGTHS = (5, 1, 9, 4)
BALANCE = torch.tensor([2.0, 0.0, 3.0, 1.5], dtype=torch.float64)
Z = torch.tensor([0.5, 1.0, 0.0, 2.0], dtype=torch.float64)


def routings(
    layers: int, tokens: int, experts: int, per_token: int, dtype: torch.dtype = torch.float64
) -> list[Routing]:
    torch.manual_seed(experts)
    made = []
    for _ in range(layers):
        logits = 2 * torch.randn(tokens, experts, dtype=dtype)
        made.append(Routing(logits.requires_grad_(), logits.topk(per_token).indices))
    return made


def naive(layers: list[list[Tensor]], per_token: int, *, balanced: bool = True) -> Tensor:
    """A conversation and a token at a time; layers of conversations of [n, N] logits."""
    total = torch.zeros((), dtype=torch.float64)
    for conversations in layers:
        for number, logits in enumerate(conversations):
            count, experts = logits.shape
            probabilities = [row.exp() / row.exp().sum() for row in logits]
            chosen = [row.topk(per_token).indices.tolist() for row in logits]
            balance = 0.0
            for expert in range(experts):
                share = sum(expert in picks for picks in chosen) / (per_token * count)
                balance = balance + experts * share * sum(p[expert] for p in probabilities) / count
            z = sum(row.exp().sum().log() ** 2 for row in logits) / count
            total = total + (BALANCE[number] * balance if balanced else 0.0) + Z[number] * z
    return total / len(layers)


def index_of(lengths: tuple[int, ...], padding: int) -> Tensor:
    parts = [torch.full((n,), i) for i, n in enumerate(lengths)]
    return torch.cat([*parts, torch.full((padding,), -1)])


@pytest.mark.parametrize(("experts", "per_token"), [(4, 1), (4, 2), (8, 3), (2, 1), (2, 2)])
@pytest.mark.parametrize("layers", [1, 3])
def test_value_and_gradient_are_those_of_the_formulas(experts, per_token, layers):
    tokens, padding = sum(LENGTHS), 6
    made = routings(layers, tokens + padding, experts, per_token)
    found = router_loss(made, Conversations(index_of(LENGTHS, padding), BALANCE, Z))
    found.backward()
    copies = [layer.logits.detach()[:tokens].clone().requires_grad_() for layer in made]
    parts = [list(copy.split(LENGTHS)) for copy in copies]
    expected = naive(parts, per_token, balanced=per_token < experts)
    expected.backward()
    torch.testing.assert_close(found, expected)
    for layer, copy in zip(made, copies, strict=True):
        torch.testing.assert_close(layer.logits.grad[:tokens], copy.grad)
        assert not layer.logits.grad[tokens:].any(), "padding has no gradient"


def test_balance_is_one_for_any_choices_of_a_balanced_router():
    logits = 9.0 * torch.eye(4, dtype=torch.float64).repeat(3, 1)
    pairs = torch.stack([logits.argmax(-1), (logits.argmax(-1) + 1) % 4], -1)
    for chosen in (pairs[:, :1], pairs):
        one = Conversations(torch.zeros(12, dtype=torch.long), torch.ones(1), torch.zeros(1))
        assert float(router_loss([Routing(logits, chosen)], one)) == pytest.approx(1.0)
    collapsed = torch.zeros(12, 1, dtype=torch.long)
    logits = torch.tensor([9.0, 0, 0, 0], dtype=torch.float64).repeat(12, 1)
    assert float(router_loss([Routing(logits, collapsed)], one)) == pytest.approx(4.0, rel=1e-2)


def test_sums_over_micro_batches_are_the_sum_over_the_batch():
    (whole,) = routings(1, sum(LENGTHS), 4, 2)
    index = index_of(LENGTHS, 0)
    total = router_loss([whole], Conversations(index, BALANCE, Z))
    parts = 0.0
    for members in ([0, 2], [1], [3]):
        here = torch.isin(index, torch.tensor(members))
        number = torch.tensor([members.index(int(i)) for i in index[here]])
        part = Routing(whole.logits[here], whole.chosen[here])
        parts = parts + router_loss([part], Conversations(number, BALANCE[members], Z[members]))
    torch.testing.assert_close(total, parts)


def test_what_padding_holds_does_not_matter():
    (layer,) = routings(1, 8, 4, 2)
    conversations = Conversations(index_of((5,), 3), BALANCE[:1], Z[:1])
    broken = layer.logits.detach().clone()
    broken[5:] = float("inf")
    broken.requires_grad_()
    found = router_loss([Routing(broken, layer.chosen)], conversations)
    torch.testing.assert_close(found, router_loss([layer], conversations))
    found.backward()
    assert bool(broken.grad.isfinite().all())


def test_half_precision_is_summed_in_single():
    (layer,) = routings(1, 4096, 8, 2)
    one = Conversations(torch.zeros(4096, dtype=torch.long), torch.ones(1), torch.ones(1))
    halved = Routing(layer.logits.detach().bfloat16(), layer.chosen)
    expected = router_loss([Routing(halved.logits.double(), layer.chosen)], one)
    torch.testing.assert_close(router_loss([halved], one).double(), expected, rtol=1e-5, atol=0)


def test_load_and_entropy_by_hand():
    logits = torch.tensor([[0.0, 0, -100], [3.0, 0, -100], [9.0, 9, 9]]).log_softmax(-1)
    chosen = torch.tensor([[0, 1], [0, 1], [2, 0]])
    load = routing_sums([Routing(logits, chosen)], torch.tensor([True, True, False]))
    share = 1 / (1 + torch.tensor(-3.0).exp())
    expected = torch.tensor([0.5 + share, 1.5 - share, 0.0])
    torch.testing.assert_close(load[0, :3], expected, atol=1e-6, rtol=0)
    entropy = torch.log(torch.tensor(2.0)) - share * share.log() - (1 - share) * (1 - share).log()
    assert float(load[0, 3]) == pytest.approx(float(entropy), abs=1e-5)


def test_arguments_that_do_not_fit_are_refused():
    conversations = Conversations(index_of((5,), 3), BALANCE[:1], Z[:1])
    with pytest.raises(ValueError, match="no layer has a router"):
        router_loss([], conversations)
    with pytest.raises(ValueError, match="saw 6 tokens of 8"):
        router_loss(routings(1, 6, 4, 2), conversations)
