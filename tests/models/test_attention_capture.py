"""Capture inside ordinary forward passes, against the maps that eager attention returns."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MistralConfig, MixtralConfig

from dominie.core.errors import InputError, RunError
from dominie.losses.attention_rows import Projections
from dominie.models.attention_capture import AttentionTarget, StudentAttention, TeacherAttention

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def model_of(config, seed: int = 0, implementation: str = "sdpa") -> nn.Module:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation=implementation, experts_implementation="eager"
    )
    with torch.no_grad():  # sharper attention than an untrained model's
        for parameter in model.parameters():
            parameter.mul_(3)
    return model.double()


def mistral(seed: int = 0, implementation: str = "sdpa", **changes) -> nn.Module:
    config = MistralConfig(**(SMALL | {"sliding_window": None} | changes))
    return model_of(config, seed, implementation)


def mixtral(seed: int = 1, **changes) -> nn.Module:
    config = MixtralConfig(**(SMALL | {"num_local_experts": 2, "sliding_window": None} | changes))
    return model_of(config, seed).requires_grad_(False).eval()


PAIRS = [(0, 0), (1, 1), (2, 2)]


def batch_of(rows: int = 3, length: int = 12, seed: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(64, (rows, length), generator=generator)
    weights = torch.rand(rows, length, generator=generator, dtype=torch.float64)
    return ids, weights * (weights > 0.3)


def maps(model: nn.Module, ids: Tensor, **inputs) -> tuple[Tensor, ...]:
    """Attention maps of an eager copy that shares the model's parameters."""
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    attentions = model(input_ids=ids, output_attentions=True, use_cache=False, **inputs).attentions
    model.set_attn_implementation(implementation)
    return attentions


def divergence_from_maps(
    student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], weights: Tensor, pairs=PAIRS
) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for s, t in pairs:
        a, b = student[s].clamp_min(1e-300), teacher[t].clamp_min(1e-300)
        b = b.unflatten(1, (a.shape[1], -1))
        rows = (b * (b.log() - a.log().unsqueeze(2))).sum(-1).mean(2)  # [B, H, L]
        total = total + (rows * weights[:, None]).sum() / (a.shape[1] * len(pairs))
    return total


def targets_of(teacher: nn.Module, layers, ids: Tensor, weights: Tensor, rows=None, **inputs):
    rows = torch.arange(len(ids)) if rows is None else torch.tensor(rows)
    inputs = {name: value[rows] for name, value in inputs.items()}
    kept = TeacherAttention(teacher, layers)
    with torch.no_grad():
        teacher(input_ids=ids[rows], use_cache=False, **inputs)
    target = AttentionTarget(rows, weights[rows], kept.take())
    kept.detach()
    return target


def gradients_of(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    zeros = {n: torch.zeros_like(g) for n, g in (expected | found).items()}
    for name, zero in zeros.items():
        torch.testing.assert_close(
            found.get(name, zero),
            expected.get(name, zero),
            rtol=0,
            atol=1e-5 * float(expected.get(name, zero).abs().max()),  # norms run in float32
            msg=lambda m, name=name: f"{name}: {m}",
        )
    assert any((g != 0).any() for g in expected.values())


@pytest.mark.parametrize("backend", ["auto", "eager", "sdpa"])
@pytest.mark.parametrize("windows", [(None, None), (5, None), (7, 4), (None, 3)])
def test_loss_and_gradients_are_those_of_maps(backend, windows) -> None:
    student, teacher = mistral(sliding_window=windows[0]), mixtral(sliding_window=windows[1])
    ids, weights = batch_of()
    target = targets_of(teacher, [0, 1, 2], ids, weights)
    scored = StudentAttention(student, PAIRS, backend=backend)
    scored.expect([target], segment_ids=None, value=True)
    student(input_ids=ids, use_cache=False)
    found = scored.take()
    found_gradients = gradients_of(found, student)
    scored.detach()
    if windows[0] == windows[1]:
        expected = divergence_from_maps(maps(student, ids), maps(teacher, ids), weights)
    else:  # both see only what both can see: maps of the larger, cut to the smaller, renormalised
        window = min(w for w in windows if w is not None)
        near = torch.ones(12, 12).tril().triu(1 - window).double()
        both = []
        for model in (student, teacher):
            cut = [a * near for a in maps(model, ids)]
            both.append(tuple(a / a.sum(-1, keepdim=True) for a in cut))
        expected = divergence_from_maps(both[0], both[1], weights)
    torch.testing.assert_close(found, expected)
    assert_same_gradients(found_gradients, gradients_of(expected, student))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_outputs_stay_those_of_the_stock_attention(implementation) -> None:
    student = mistral(implementation=implementation).float().eval()
    ids, weights = batch_of(length=16)
    with torch.no_grad():
        expected = student(input_ids=ids).logits
        target = targets_of(mixtral().float(), [0, 1, 2], ids, weights)
        scored = StudentAttention(student, PAIRS)
        assert student.config._attn_implementation != implementation
        scored.expect([target], segment_ids=None, value=True)
        assert (student(input_ids=ids).logits == expected).all()
        assert scored.take() > 0
        assert (student(input_ids=ids).logits == expected).all()
        generated = student.generate(ids[:1, :5], max_new_tokens=5, do_sample=False)
        scored.detach()
        assert student.config._attn_implementation == implementation
        stock = student.generate(ids[:1, :5], max_new_tokens=5, do_sample=False)
        assert (generated == stock).all()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_under_autocast_what_is_scored_is_what_the_stock_attention_reads(
    implementation, monkeypatch
) -> None:
    student = mistral(implementation=implementation).float()
    ids, weights = batch_of()
    target = targets_of(mixtral().bfloat16(), range(3), ids, weights.float())
    with torch.autocast("cpu", torch.bfloat16):
        stock = student(input_ids=ids, use_cache=False).logits
    scored = StudentAttention(student, PAIRS)
    seen: list[Projections] = []
    score = scored.on_attention
    monkeypatch.setattr(
        scored, "on_attention", lambda layer, part: (seen.append(part), score(layer, part))
    )
    scored.expect([target], segment_ids=None, value=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = student(input_ids=ids, use_cache=False).logits
    assert torch.equal(output, stock), "rounded before the stock attention or in it, once"
    assert {part.dtype for each in seen for part in (each.query, each.key)} == {torch.bfloat16}
    found = gradients_of(scored.take(), student)
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    assert found["model.layers.0.self_attn.q_proj.weight"].norm() > 0


def test_several_teachers_teach_rows_of_their_own() -> None:
    student, first, second = mistral(), mixtral(1), mistral(5).requires_grad_(False)
    ids, weights = batch_of(rows=4)
    one = targets_of(first, [0, 1, 2], ids, weights, rows=[2, 0])
    two = targets_of(second, [0, 1, 2], ids, weights, rows=[3])
    scored = StudentAttention(student, PAIRS)
    scored.expect([one, two], segment_ids=None, value=True)
    student(input_ids=ids, use_cache=False)
    found = scored.take()
    found_gradients = gradients_of(found, student)
    scored.detach()
    own = maps(student, ids)
    expected = sum(
        divergence_from_maps(tuple(a[rows] for a in own), maps(teacher, ids[rows]), weights[rows])
        for teacher, rows in ((first, [2, 0]), (second, [3]))
    )
    torch.testing.assert_close(found, expected)
    assert_same_gradients(found_gradients, gradients_of(expected, student))


def test_packed_and_right_padded_batches_have_the_same_loss_and_gradients() -> None:
    student, teacher = mistral(), mixtral()
    lengths = [5, 3, 4]
    generator = torch.Generator().manual_seed(3)
    pieces = [torch.randint(64, (n,), generator=generator) for n in lengths]
    weights = [torch.rand(n, generator=generator, dtype=torch.float64) for n in lengths]
    padded = {
        "input_ids": torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True, padding_value=0)
    }
    padded_weights = torch.nn.utils.rnn.pad_sequence(weights, batch_first=True)
    packed = {
        "input_ids": torch.cat([*pieces, torch.zeros(2, dtype=torch.long)])[None],
        "position_ids": torch.cat([torch.arange(n) for n in [*lengths, 2]])[None],
    }
    packed_weights = torch.cat([*weights, torch.zeros(2, dtype=torch.float64)])[None]
    segments = torch.tensor([[0] * 5 + [1] * 3 + [2] * 4 + [3] * 2])
    found = []
    for inputs, row_weights, ids in (
        (padded, padded_weights, None),
        (packed, packed_weights, segments),
    ):
        extra = {k: v for k, v in inputs.items() if k != "input_ids"}
        target = targets_of(teacher, [0, 1, 2], inputs["input_ids"], row_weights, **extra)
        scored = StudentAttention(student, PAIRS)
        scored.expect([target], segment_ids=ids, value=True)
        student(**inputs, use_cache=False)
        loss = scored.take()
        found.append((loss.detach(), gradients_of(loss, student)))
        scored.detach()
    torch.testing.assert_close(found[0][0], found[1][0])
    assert_same_gradients(found[1][1], found[0][1])


def step_gradients(student, target, ids, *, value=True, backend="auto") -> dict[str, Tensor]:
    """Gradients of logits and attention together, as a training step has them."""
    scored = StudentAttention(student, PAIRS, backend=backend)
    scored.expect([target], segment_ids=None, value=value)
    logits = student(input_ids=ids, use_cache=False).logits
    loss = scored.take() + logits.square().mean()
    gradients = gradients_of(loss, student)
    scored.detach()
    return gradients


@pytest.mark.parametrize("backend", ["tiles", "sdpa", "eager"])
@pytest.mark.parametrize("value", [True, False])
def test_checkpointing_changes_no_gradient(backend, value) -> None:
    ids, weights = batch_of()
    student = mistral().train()
    target = targets_of(mixtral(), [0, 1, 2], ids, weights)
    expected = step_gradients(student, target, ids)
    student.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same_gradients(
        step_gradients(student, target, ids, value=value, backend=backend), expected
    )


def test_checkpointing_scores_a_layer_once_and_keeps_nothing_after_backward(monkeypatch) -> None:
    from dominie.models import attention_capture as capture

    scored_terms = []
    original = capture.divergence_of_terms

    def counted(query, key, scale, terms, **options):
        scored_terms.append(len(terms))
        return original(query, key, scale, terms, **options)

    monkeypatch.setattr(capture, "divergence_of_terms", counted)
    ids, weights = batch_of()
    student = mistral().train()
    student.gradient_checkpointing_enable({"use_reentrant": False})
    target = targets_of(mixtral(), [0, 1, 2], ids, weights)
    alive = weakref.ref(target.layers[1].query)
    scored = StudentAttention(student, PAIRS)
    scored.expect([target], segment_ids=None, value=True)
    loss = student(input_ids=ids, use_cache=False).logits.mean() + scored.take()
    assert scored_terms == [1, 1, 1]
    del target
    assert alive() is not None
    loss.backward()
    assert scored_terms == [1, 1, 1, 0, 0, 0]
    del loss
    gc.collect()
    assert alive() is None


def test_reentrant_checkpointing_is_refused() -> None:
    ids, weights = batch_of()
    student = mistral().train()
    target = targets_of(mixtral(), [0, 1, 2], ids, weights)
    student.gradient_checkpointing_enable({"use_reentrant": True})
    student.enable_input_require_grads()
    scored = StudentAttention(student, PAIRS)
    scored.expect([target], segment_ids=None, value=True)
    with pytest.raises(InputError, match="reentrant"):
        student(input_ids=ids, use_cache=False)


def test_forwards_in_between_do_not_disturb_a_checkpointed_backward() -> None:
    ids, weights = batch_of()
    student = mistral().train()
    target = targets_of(mixtral(), [0, 1, 2], ids, weights)
    expected = step_gradients(student, target, ids)
    student.gradient_checkpointing_enable({"use_reentrant": False})
    scored = StudentAttention(student, PAIRS)
    scored.expect([target], segment_ids=None, value=False)
    loss = student(input_ids=ids, use_cache=False).logits.square().mean() + scored.take()
    with torch.no_grad():
        student(input_ids=ids[:, :4])
    student(input_ids=ids[:2], use_cache=False)
    scored.expect([target], segment_ids=None, value=True)
    student(input_ids=ids, use_cache=False)
    assert_same_gradients(gradients_of(loss, student), expected)
    scored.detach()


def test_gradient_accumulation_sums_to_the_whole_batch() -> None:
    ids, weights = batch_of(rows=4)
    student, teacher = mistral(), mixtral()
    scored = StudentAttention(student, PAIRS)

    def loss_of(rows) -> Tensor:
        target = targets_of(teacher, [0, 1, 2], ids[rows], weights[rows])
        scored.expect([target], segment_ids=None, value=True)
        student(input_ids=ids[rows], use_cache=False)
        return scored.take()

    expected = gradients_of(loss_of([0, 1, 2, 3]), student)
    student.zero_grad()
    for rows in ([0, 3], [1], [2]):
        loss_of(rows).backward()
    found = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    assert_same_gradients(found, expected)


def test_frozen_lower_layers_get_nothing_and_the_others_what_is_theirs() -> None:
    ids, weights = batch_of()
    student = mistral().train()
    target = targets_of(mixtral(), [0, 1, 2], ids, weights)
    expected = step_gradients(student, target, ids)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_("layers.2" in name)
    student.gradient_checkpointing_enable({"use_reentrant": False})
    found = step_gradients(student, target, ids)
    assert found.keys() == {name for name in expected if "layers.2" in name}
    assert_same_gradients(found, {name: expected[name] for name in found})


def test_adapters_learn_and_base_and_student_can_be_one_model() -> None:
    peft = pytest.importorskip("peft")
    ids, weights = batch_of()
    student = mistral()
    base = copy.deepcopy(student)
    config = peft.LoraConfig(
        r=2, lora_alpha=1, target_modules=["q_proj", "k_proj"], init_lora_weights=False
    )
    torch.manual_seed(0)
    adapted = peft.get_peft_model(student, config).double()
    kept = TeacherAttention(adapted, [0, 1, 2])
    scored = StudentAttention(adapted, PAIRS)
    with torch.no_grad(), adapted.disable_adapter():
        adapted(input_ids=ids, use_cache=False)
    target = AttentionTarget(torch.arange(3), weights, kept.take())
    scored.expect([target], segment_ids=None, value=True)
    adapted(input_ids=ids, use_cache=False)
    found = scored.take()
    found_gradients = gradients_of(found, adapted)
    assert found_gradients
    assert all("lora" in name for name in found_gradients)
    scored.detach()
    kept.detach()
    expected = divergence_from_maps(maps(adapted, ids), maps(base, ids), weights)
    torch.testing.assert_close(found, expected)
    assert_same_gradients(found_gradients, gradients_of(expected, adapted))


def test_groups_of_teacher_heads_and_another_depth() -> None:
    student = mistral(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    teacher = mixtral(num_hidden_layers=4)
    pairs = [(0, 1), (1, 3), (1, 2)]
    ids, weights = batch_of()
    scored = StudentAttention(student, pairs)
    scored.expect([targets_of(teacher, [1, 2, 3], ids, weights)], segment_ids=None, value=True)
    student(input_ids=ids, use_cache=False)
    found = scored.take()
    scored.detach()
    expected = divergence_from_maps(maps(student, ids), maps(teacher, ids), weights, pairs)
    torch.testing.assert_close(found, expected)


def test_heads_that_cannot_be_shared_out_are_an_input_error() -> None:
    student = mistral()
    teacher = mixtral(num_attention_heads=2, num_key_value_heads=2)
    ids, weights = batch_of()
    scored = StudentAttention(student, PAIRS)
    scored.expect([targets_of(teacher, [0, 1, 2], ids, weights)], segment_ids=None, value=True)
    with pytest.raises(InputError, match="multiple of the student's 4 heads"):
        student(input_ids=ids, use_cache=False)


@pytest.mark.parametrize("value", [True, False])
def test_a_batch_without_a_weighted_row_is_normal(value, caplog) -> None:
    ids, weights = batch_of()
    student = mistral()
    target = targets_of(mixtral(), [0, 1, 2], ids, torch.zeros_like(weights))
    scored = StudentAttention(student, PAIRS)
    for targets in ([target], [target], []):
        scored.expect(targets, segment_ids=None, value=value)
        student(input_ids=ids, use_cache=False)
        loss = scored.take()
        assert loss == 0
        assert all((g == 0).all() for g in gradients_of(loss, student).values())
    assert scored.batches_without_rows == 3 * value
    assert caplog.text.count("no row to match attention on") == value


@pytest.mark.parametrize("share", ["row_fraction", "layer_fraction"])
def test_sampling_is_unbiased(share) -> None:
    ids, weights = batch_of(rows=2, length=8)
    student, teacher = mistral(), mixtral()
    target = targets_of(teacher, [0, 1, 2], ids, weights)

    def losses(count: int, **options) -> Tensor:
        scored = StudentAttention(student, PAIRS, **options)
        taken = []
        for _ in range(count):
            scored.expect([target], segment_ids=None, value=True)
            with torch.no_grad():
                student.eval()(input_ids=ids, use_cache=False)
            taken.append(scored.take())
        scored.detach()
        return torch.stack(taken)

    (whole,) = losses(1)
    torch.manual_seed(0)
    sampled = losses(150, **{share: 0.4})
    assert sampled.unique().numel() > 2
    error = (sampled.mean() - whole).abs()
    assert error < 3.5 * sampled.std() / len(sampled) ** 0.5


def test_a_step_of_generation_is_not_kept_by_a_teacher() -> None:
    teacher = mixtral()
    kept = TeacherAttention(teacher, [0, 1, 2])
    ids, _ = batch_of()
    teacher(input_ids=ids)
    generated = teacher.generate(ids[:1, :5], max_new_tokens=3, do_sample=False)
    assert generated.shape == (1, 8)
    layers = kept.take()
    assert {p.query.shape[2] for p in layers.values()} == {5}
    assert isinstance(layers[0], Projections)
    with pytest.raises(InputError, match="did not pass its attention"):
        kept.take()


def test_a_saved_model_knows_nothing_of_the_capture(tmp_path) -> None:
    student = mistral()
    StudentAttention(student, PAIRS)
    student.save_pretrained(tmp_path)
    assert "dominie" not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
    assert copy.deepcopy(student)(input_ids=batch_of()[0]).logits.shape == (3, 12, 64)


def test_numbers_that_are_not_finite_fail_the_run_by_name() -> None:
    ids, weights = batch_of()
    student = mistral()
    target = targets_of(mixtral(), [0, 1, 2], ids, weights)
    with torch.no_grad():
        student.model.layers[1].self_attn.q_proj.weight[0, 0] = torch.nan
    scored = StudentAttention(student, PAIRS)
    scored.expect([target], segment_ids=None, value=True)
    with pytest.raises(RunError, match="layer 1: attention cannot be compared: student: query"):
        student(input_ids=ids, use_cache=False)


def test_take_needs_an_expected_forward() -> None:
    scored = StudentAttention(mistral(), PAIRS)
    with pytest.raises(RuntimeError, match="expect"):
        scored.take()


def test_a_model_with_hooks_can_be_freed() -> None:
    student = mistral()
    scored = StudentAttention(student, PAIRS)
    alive = weakref.ref(student)
    del student
    gc.collect()
    assert alive() is None
    scored.detach()


@pytest.mark.full
def test_a_compiled_student_is_scored() -> None:
    ids, weights = batch_of()
    student = mistral().train()
    target = targets_of(mixtral(), [0, 1, 2], ids, weights)
    expected = step_gradients(student, target, ids)
    student.compile(backend="eager")
    assert_same_gradients(step_gradients(student, target, ids), expected)
