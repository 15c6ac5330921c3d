"""A teacher with another tokenizer, against an oracle that follows the definition word by word."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_model
from tiny_tokenizers import byte_level, sentence_piece, word_piece
from torch.nn import functional

from dominie.data.batch import Batch, collate
from dominie.data.formats import Conversation
from dominie.data.paired_text import Paired, paired
from dominie.data.token_bytes import (
    END,
    TokenBytes,
    Vocabularies,
    VocabularyMap,
    token_bytes,
    vocabulary_map,
)
from dominie.losses.forward_pass import ForwardPass
from dominie.losses.objective import Objective
from dominie.losses.targets import Signal
from dominie.losses.terms import LossTerms, NextToken, Prediction, Spans
from dominie.models.head import output_head
from dominie.teachers.ahead import signals
from dominie.teachers.cached import key_of, key_of_row
from dominie.teachers.span_teacher import SpanTeacher, asked_of
from dominie.teachers.teacher import LocalTeacher

ANSWERS = [
    "The quick teachers taught naïve students.",
    "def teach(x):\n        if x:\n            return 1,234\n",
    "東京は首都です 👩‍🏫🎓 e\u0301\u0323! Teachers,dogs",
    " " * 40 + "double  spaces\t\tand tabs   ",
    "Unseen wörds: zyzzyva 🦊",
]
TAU = 5.0


def conversations(answers: list[str] = ANSWERS) -> list[Conversation]:
    """Short chats; the last one has two turns of the assistant."""
    chats = [
        Conversation(
            [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": each}], None, ""
        )
        for each in answers
    ]
    chats[-1].messages.extend(
        [{"role": "user", "content": "More?"}, {"role": "assistant", "content": "Quickly, dogs."}]
    )
    return chats


class Pairing:
    """Conversations as a student's batch, and their pairs with a teacher."""

    def __init__(self, student: Any, teacher: Any, chats: list[Conversation]) -> None:
        self.tables = token_bytes(student), token_bytes(teacher)
        both = paired(chats, student, teacher, self.tables)
        self.rows = [one.row(chat) for (one, _), chat in zip(both, chats, strict=True)]
        self.pairs = {key_of_row(row): pair for row, (_, pair) in zip(self.rows, both, strict=True)}
        self.words = Vocabularies(*self.tables, vocabulary_map(*self.tables[::-1]))

    def batch(self, pack_to: int | None = None) -> Batch:
        return collate([(0, row) for row in self.rows], pack_to=pack_to)

    def pair_of(self, span: Any) -> Paired:
        return self.pairs[key_of(span.input_ids, span.taught)]

    def teacher(self, model: Any, **options: Any) -> SpanTeacher:
        return SpanTeacher(model.eval(), self.pair_of, self.words, **options)


def model_of(tokenizer: Any, family: str, seed: int) -> Any:
    """A model of two layers with a tokenizer's vocabulary and some rows of padding."""
    return tiny_model(
        family,
        seed=seed,
        dtype=torch.float64,
        vocab_size=len(tokenizer) + 3,
        max_position_embeddings=512,
    )


def losses_of(model: Any, batch: Batch, signal: Signal, terms: LossTerms) -> Any:
    """The loss of a student on a batch."""
    model.eval()
    hidden = model.get_decoder()(**batch.model_inputs()).last_hidden_state
    forward = ForwardPass(
        hidden=hidden,
        head=output_head(model),
        labels=batch.labels,
        source_ids=batch.source_ids,
        segment_ids=batch.segment_ids,
        signal=signal,
        spans=batch.spans,
    )
    return Objective([terms])(forward)


def gradients(model: Any) -> torch.Tensor:
    found = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.cat([each.flatten() for each in found])


# The oracle ---------------------------------------------------------------------------------------


def ends(tokenizer: Any, table: TokenBytes, messages: Any, trimmed: bool) -> Any:
    """Token ids, and {byte of an answer's text: index of the token that ends there} by answer."""
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = found["input_ids"], found["offset_mapping"]
    answers, start = [], 0
    for message in messages:
        content = message["content"].strip() if trimmed else message["content"]
        start = text.index(content, start)
        stop = start + len(content)
        if message["role"] == "assistant":
            inside = [i for i, (a, b) in enumerate(offsets) if b > start and a < stop and b > a]
            cuts, low = {}, -1
            for i in inside:
                if offsets[i][1] > stop:
                    continue
                # A token inside a character is said to end with it.
                end, after = len(text[start : offsets[i][1]].encode()), i
                while after + 1 in inside and offsets[after + 1][0] < offsets[after][1]:
                    after += 1
                within = [table.of[ids[j]] for j in range(i + 1, after + 1)]
                if None in within or offsets[after][1] > stop:
                    continue
                end = len(text[start : offsets[after][1]].encode()) - len(b"".join(within))
                if end > low:
                    cuts[end], low = i, end
            if offsets[inside[0]][0] >= start:
                cuts[0] = inside[0] - 1
            closing = next(i for i in range(inside[-1], len(ids)) if table.of[ids[i]] == END)
            cuts[len(content.encode()) + 1] = closing
            answers.append((content.encode() + END, cuts))
        start = stop
    return ids, answers


def oracle(student: Any, teacher: Any, pairing: Pairing, tokenizers: Any, chats: Any) -> Any:
    """Σ of the loss over all conversations, differentiable; and how many of each kind there are."""
    ours, theirs = pairing.tables
    longest = [
        max(
            (v for v in range(len(ours)) if ours.of[v] and t and t.startswith(ours.of[v])),
            key=lambda v: (len(ours.of[v]), v not in ours.spare, -v),
            default=None,
        )
        for t in theirs.of
    ]
    reached = {v for v in longest if v is not None}
    size_s, size_t = (m.config.vocab_size for m in (student, teacher))
    longest += [None] * (size_t - len(longest))
    outcome = list(range(size_s))
    for v in range(len(ours)):
        if v not in reached and ours.of[v]:
            begins = [u for u in reached if ours.of[v].startswith(ours.of[u])]
            outcome[v] = max(begins, key=lambda u: len(ours.of[u]), default=v)
    boundary = [
        torch.tensor([bool(b) and b[:1] in (b" ", b"\t", b"\n", b"\r", END) for b in t.of])
        for t in (ours, theirs)
    ]
    total = torch.zeros((), dtype=torch.float64)
    counts = {"direct": 0, "whole": 0, "chained": 0}
    trimmed = any("trim" in each.chat_template for each in tokenizers)
    for chat in chats:
        (ids_s, all_s), (ids_t, all_t) = (
            ends(tok, table, chat.messages, trimmed)
            for tok, table in zip(tokenizers, pairing.tables, strict=True)
        )
        log_s = student(torch.tensor([ids_s])).logits[0].log_softmax(-1)
        log_t = teacher(torch.tensor([ids_t])).logits[0].log_softmax(-1).detach()
        for (text, cuts_s), (_, cuts_t) in zip(all_s, all_t, strict=True):
            for a, b in pairwise(sorted(cuts_s.keys() & cuts_t.keys())):
                s, t = (range(c[a] + 1, c[b] + 1) for c in (cuts_s, cuts_t))
                if not s or not t:
                    continue
                piece = text[a:b]
                if not piece.strip():
                    continue
                spelled = [
                    b"".join(table.of[ids[i]] or b"" for i in where)
                    for table, ids, where in ((ours, ids_s, s), (theirs, ids_t, t))
                ]
                exact = spelled == [piece, piece]
                log_p = sum(log_t[i - 1, ids_t[i]] for i in t)
                before = torch.zeros((), dtype=torch.float64)
                if exact:
                    p = log_t[t[0] - 1].exp()
                    mapped = torch.zeros(size_s + 1, dtype=torch.float64)
                    for token, to in enumerate(longest):
                        mapped[size_s if to is None else to] += p[token]
                    first, written, product = ids_s[s[0]], b"", torch.ones(())
                    for i in t:
                        written += theirs.of[ids_t[i]]
                        product = product * log_t[i - 1, ids_t[i]].exp()
                        if len(written) >= len(ours.of[first]):
                            break
                    counts["chained"] += i > t[0]
                    to = longest[ids_t[t[0]]]
                    mapped[size_s if to is None else to] -= product
                    mapped[first] += product
                    assert mapped.sum() == pytest.approx(1.0, abs=1e-12)
                    # Outcomes: tokens that something maps to, the label, and all others as one.
                    named = [v for v in range(size_s) if mapped[v] > 0 or v == first]
                    place = {v: n for n, v in enumerate(named)}
                    at = [place.get(v, place.get(outcome[v], len(named))) for v in range(size_s)]
                    mass = torch.zeros(len(named) + 1, dtype=torch.float64)
                    q = mass.index_add(0, torch.tensor(at), log_s[s[0] - 1].exp())
                    goal = torch.cat([mapped[named], mapped[size_s:]])
                    there = (goal > 0) & (q > 0)
                    total = total + (goal[there] * (goal[there] / q[there]).log()).sum()
                    before = mapped[first].log()
                    counts["direct"] += 1
                rest = list(s)[1:] if exact else list(s)
                ends_turn = piece.endswith(END)
                if not rest or (not ends_turn and t[-1] + 1 >= len(ids_t)):
                    continue
                log_q = sum(log_s[i - 1, ids_s[i]] for i in rest)
                if not ends_turn:
                    follows = log_t[t[-1], : len(theirs)][boundary[1]].logsumexp(0)
                    if follows < np.log(0.1):
                        continue
                    log_p = log_p + follows
                    log_q = log_q + log_s[s[-1], : len(ours)][boundary[0]].logsumexp(0).detach()
                big_p = ((log_p - before) / TAU).exp().clamp(max=np.exp(-1e-6))
                big_q = (log_q / TAU).exp().clamp(max=np.exp(-1e-6))
                total = total + big_p * (big_p / big_q).log()
                total = total + (1 - big_p) * ((1 - big_p) / (1 - big_q)).log()
                counts["whole"] += 1
    return total, counts


# Tests --------------------------------------------------------------------------------------------

KINDS = {
    "bytes from bytes": (byte_level, lambda: byte_level(600)),
    "bytes from pieces": (byte_level, sentence_piece),
    "pieces from bytes": (sentence_piece, byte_level),
    "bytes from words": (byte_level, word_piece),
    "words from pieces": (word_piece, sentence_piece),
}


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_are_those_of_the_definition(kind: str) -> None:
    tokenizers = [make() for make in KINDS[kind]]
    chats = conversations(ANSWERS if kind == "bytes from pieces" else ANSWERS[2:])
    pairing = Pairing(*tokenizers, chats)
    student = model_of(tokenizers[0], "llama", 1)
    teacher = model_of(tokenizers[1], "qwen2", 2).requires_grad_(False)

    expected, counts = oracle(student, teacher, pairing, tokenizers, chats)
    expected.backward()
    wanted = gradients(student)
    student.zero_grad()

    batch = pairing.batch()
    signal = pairing.teacher(teacher, top=10_000).signal(batch)
    losses = losses_of(student, batch, signal, LossTerms(spans=Spans(chunk_temperature=TAU)))
    losses.total.backward()
    assert counts["direct"] >= 5
    assert counts["whole"] >= 1
    assert losses.total.item() == pytest.approx(expected.item(), rel=1e-9)
    assert functional.cosine_similarity(gradients(student), wanted, dim=0) > 1 - 1e-12
    torch.testing.assert_close(gradients(student), wanted, rtol=1e-7, atol=1e-10)


@pytest.fixture(scope="module")
def pieces() -> tuple[Pairing, Any, Any]:
    """A student of bytes and a teacher of pieces."""
    tokenizers = byte_level(), sentence_piece()
    pairing = Pairing(*tokenizers, conversations())
    return pairing, model_of(tokenizers[0], "llama", 1), model_of(tokenizers[1], "qwen2", 2)


def test_no_mass_is_lost_and_white_space_is_silent(pieces: Any) -> None:
    pairing, _, teacher = pieces
    for top in (16, 10_000):
        found = pairing.teacher(teacher, top=top).signal(pairing.batch()).parts[0].target
        p, tail = found.target.outcomes(torch.float64)
        used = found.target.ids >= 0
        mass = torch.where(used, p, 0.0).sum(-1) + tail
        torch.testing.assert_close(mass, found.weights.double(), rtol=0, atol=1e-12)
        assert bool((used.sum(-1)[found.weights == 0] == 0).all())
    assert 0 < int(found.weights.sum()) < len(found)


def test_both_sides_are_taught_to_stop(pieces: Any) -> None:
    pairing, _, teacher = pieces
    batch = pairing.batch()
    found = pairing.teacher(teacher).signal(batch).parts[0].target
    end = pairing.words.student.ids[END]
    ends = (batch.labels.flatten()[batch.positions] == end).nonzero()[:, 0]
    assert len(ends) == len(pairing.rows) + 1
    # Where one template trims the white space before the end, the end is part of a chunk.
    assert bool((found.compared[ends] == 1).all())
    ends = ends[found.weights[ends] == 1]
    assert len(ends) >= 3
    rows = (found.target.ids[ends] == end).nonzero()
    assert len(rows) == len(ends)
    assert bool((found.target.probabilities[ends][tuple(rows.T)] > 0).all())


@pytest.mark.parametrize("pack_to", [None, 200])
def test_layout_of_batches_changes_nothing(pieces: Any, pack_to: int | None) -> None:
    pairing, student, teacher = pieces
    spans, terms = pairing.teacher(teacher), LossTerms(spans=Spans(), next_token=NextToken())
    one_by_one = 0.0
    for row in pairing.rows:
        batch = collate([(0, row)])
        one_by_one += losses_of(student, batch, spans.signal(batch), terms).total.item()
    batch = pairing.batch(pack_to)
    whole = losses_of(student, batch, spans.signal(batch), terms)
    assert whole.total.item() == pytest.approx(one_by_one, rel=1e-9)
    assert sum(whole.terms.values()).item() == pytest.approx(one_by_one, rel=1e-9)
    assert set(whole.terms) == {"next_token", "spans"}
    alone = [collate([(0, row)]) for row in pairing.rows]
    separate = sum(
        losses_of(student, each, signal, terms).total.item()
        for each, signal in zip(alone, signals(spans, alone), strict=True)
    )
    assert separate == pytest.approx(one_by_one, rel=1e-9)


@pytest.mark.parametrize("mapped", [False, True], ids=["as it is", "through the map"])
def test_one_tokenizer_gives_the_plain_loss(mapped: bool) -> None:
    tokenizer = byte_level()
    chats = conversations(["Teachers.", "東京は!", "naïve"])  # no token is white space
    pairing = Pairing(tokenizer, tokenizer, chats)
    assert pairing.words.mapped.same
    if mapped:
        identity = np.arange(len(tokenizer))
        pairing.words = replace(pairing.words, mapped=VocabularyMap(identity, identity, False))
    student, teacher = (
        tiny_model(
            "llama",
            seed=seed,
            dtype=torch.float64,
            vocab_size=len(tokenizer),
            max_position_embeddings=256,
        )
        for seed in (1, 2)
    )
    batch = pairing.batch()
    plain = LocalTeacher(teacher.eval().requires_grad_(False)).signal(batch)
    expected = losses_of(student, batch, plain, LossTerms(prediction=Prediction())).total
    expected.backward()
    wanted = gradients(student)
    student.zero_grad()
    signal = pairing.teacher(teacher, top=10_000).signal(batch)
    found = losses_of(student, batch, signal, LossTerms(spans=Spans()))
    found.total.backward()
    assert found.total.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(gradients(student), wanted, rtol=1e-9, atol=1e-12)


def test_long_white_space_takes_no_time_and_compares_nothing() -> None:
    chats = conversations(["x" + " " * 10_000 + "y"])
    start = time.monotonic()
    pairing = Pairing(byte_level(), sentence_piece(), chats)
    (row,), (both,) = pairing.rows, pairing.pairs.values()
    taught = np.append(np.asarray(row.supervised)[1:], False)
    asked = asked_of(both, np.asarray(row.input_ids), taught, pairing.words)
    assert time.monotonic() - start < 5
    assert len(both.text) > 10_000
    assert len(asked.direct.first) < 20
