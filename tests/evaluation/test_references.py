"""Metrics against scikit-learn, rouge-score and SciPy, where the full tests have them."""

from __future__ import annotations

import unicodedata
from itertools import pairwise

import numpy as np
import pytest

from dominie.data.conversations import Conversation
from dominie.evaluation.answer_text import ndcg, rouge_l, token_f1
from dominie.evaluation.metrics import score_answer
from dominie.evaluation.statistics import bootstrap_interval, macro_f1, micro_f1, spearman
from dominie.evaluation.task import MetricSettings

pytestmark = pytest.mark.full


def test_rouge_l_is_rouge_score_s():
    scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="lm-eval brings rouge-score")
    reference = scorer.RougeScorer(["rougeL"], use_stemmer=False)
    rng = np.random.default_rng(0)
    words = ["red", "a", "Hat,", "lamp", "no-one", "9", "the"]
    for _ in range(300):
        output, target = (" ".join(rng.choice(words, rng.integers(1, 12))) for _ in range(2))
        expected = reference.score(target, output)["rougeL"].fmeasure
        assert rouge_l(output, target) == pytest.approx(expected), (output, target)


@pytest.mark.parametrize("labels", [2, 3, 7])
def test_f1_is_scikit_learn_s(labels):
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    rng = np.random.default_rng(labels)
    for _ in range(50):
        right, answer = rng.integers(labels, size=(2, 20))
        counts = []
        for label in range(labels):
            wanted, given = right == label, answer == label
            hits = int((wanted & given).sum())
            counts.append([hits, int(given.sum()) - hits, int(wanted.sum()) - hits])
        sums = np.array(counts, dtype=float)
        expected = metrics.f1_score(right, answer, average="macro", zero_division=0)
        assert macro_f1(sums.ravel()) == pytest.approx(expected)
        if sums[1].sum():
            expected = metrics.f1_score(right == 1, answer == 1, zero_division=0)
            assert micro_f1(sums[1]) == pytest.approx(expected)


@pytest.mark.parametrize("k", [None, 1, 3])
def test_ndcg_is_scikit_learn_s(k):
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    rng = np.random.default_rng(2)
    for _ in range(50):
        relevances = rng.integers(0, 4, 6)
        order = rng.permutation(6)
        scores = np.empty(6)
        scores[order] = np.arange(6, 0, -1)
        gains = 2.0**relevances - 1
        expected = metrics.ndcg_score([gains], [scores], k=k) if gains.any() else 0.0
        assert ndcg((order + 1).tolist(), relevances.tolist(), k) == pytest.approx(expected)


#: Letters with marks of sixteen scripts; words of these are drawn at random.
SCRIPTS = {
    "Latin": "aàäbcçdeéñöøßtüz",
    "Vietnamese": "aạảăằâậeẹêệoọôộơợ",
    "Greek": "αάβγδεέικλσςωώ",
    "Cyrillic": "абвгдеёийклщыья",
    "Armenian": "աբգդեզէըթժ",
    "Georgian": "აბგდევზთი",
    "Hebrew": "אבגדהוזחטיכ\u05b0\u05b4\u05b8\u05bc",
    "Arabic": "ابتثجحخدذر\u064b\u064e\u064f\u0651\u0652",
    "Devanagari": "कखगघचजटडतद\u093e\u093f\u0940\u0941\u094d\u0902",
    "Bengali": "কখগঘচজটডত\u09be\u09bf\u09c0\u09cd",
    "Tamil": "கஙசஞடணதநபம\u0bbe\u0bbf\u0bc0\u0bcd",
    "Thai": "กขคงจชซดตท\u0e31\u0e34\u0e35\u0e48\u0e49",
    "Tibetan": "ཀཁགངཅཆཇ\u0f72\u0f74\u0f7a",
    "Ethiopic": "ሀለሐመሠረሰቀበ",
    "Hangul": "가각갂나낙다닥라락마",
    "Han": "红色连衣裙圆领拼接𠮷",
    "Kana": "あいうがぎぐアイウガー",
}


def drawn(rng, script, most=9):
    """A text of random words of a script, in a random Unicode form, with punctuation."""
    letters, found = SCRIPTS[script], []
    for _ in range(rng.integers(1, most)):
        word = "".join(rng.choice([*letters], rng.integers(1, 3)))
        found.append(word.upper() if rng.random() < 0.2 else word)
    text = str(rng.choice([" ", ", ", "، ", "。"])).join(found)
    return unicodedata.normalize(str(rng.choice(["NFC", "NFD"])), text)


def words_by_category(text):
    """Words by the general categories of characters, without regular expressions."""
    text = unicodedata.normalize("NFD", unicodedata.normalize("NFC", text)).casefold()
    found, inside = [], False
    for char in unicodedata.normalize("NFC", text):
        name = unicodedata.name(char, "")
        alone = name.startswith(("CJK UNIFIED", "HIRAGANA", "KATAKANA"))
        if unicodedata.category(char)[0] not in "LMN":
            inside = False
        elif inside and not alone:
            found[-1] += char
        else:
            found.append(char)
            inside = not alone
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_words_of_every_script_are_rouge_score_s_and_scikit_learn_s(script):
    scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="lm-eval brings rouge-score")
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    words = type("Words", (), {"tokenize": staticmethod(words_by_category)})
    reference = scorer.RougeScorer(["rougeL"], tokenizer=words)
    rng = np.random.default_rng(len(script))
    shared = 0
    for _ in range(40):
        output, target = drawn(rng, script), drawn(rng, script)
        expected = reference.score(target, output)["rougeL"].fmeasure
        assert rouge_l(output, target) == pytest.approx(expected), (output, target)
        mine, theirs = ({*numbered(words_by_category(text))} for text in (output, target))
        every = sorted(mine | theirs)
        expected = metrics.f1_score(*([word in one for word in every] for one in (theirs, mine)))
        assert token_f1(output, target) == pytest.approx(expected), (output, target)
        shared += 0 < expected < 1
    assert shared > 5, "the texts must share some words"


def numbered(words):
    """Words with how often each occurred before, so that a set holds repetitions."""
    return [(word, words[:i].count(word)) for i, word in enumerate(words)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_labels_and_spans_of_every_script_are_scikit_learn_s(script):
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    rng = np.random.default_rng(len(script) + 100)
    form = (str(form) for form in rng.choice(["NFC", "NFD"], 10_000))
    letters = [char for char in SCRIPTS[script] if unicodedata.category(char)[0] == "L"]
    labels = [f"{one}{other}" for one, other in pairwise(letters)][:5]
    caseless = {label.casefold() for label in labels}
    assert len(caseless) == 5
    sides = list(zip(["", "“", "「", "("], ["。", "”", "」", ")"], strict=True))
    macro = MetricSettings(metric="macro_f1", labels=labels)
    span = MetricSettings(metric="span_f1")
    for _ in range(6):
        right, given = rng.integers(5, size=(2, 12))
        sums = 0
        for r, g in zip(right, given, strict=True):
            before, after = sides[rng.integers(4)]
            output = unicodedata.normalize(next(form), f" {before}{labels[g]}{after}\n")
            sums = sums + np.array(score_answer(macro, output, row(labels[r])).sums, dtype=float)
        expected = metrics.f1_score(right, given, average="macro", zero_division=0)
        assert macro_f1(sums) == pytest.approx(expected)
        wanted, found = rng.random((2, 5)) < 0.6
        separator = str(rng.choice([", ", "、", "，", "،", "；", "\n", "፣"]))
        output = separator.join(label for label, is_in in zip(labels, found, strict=True) if is_in)
        target = ", ".join(label for label, is_in in zip(labels, wanted, strict=True) if is_in)
        score = score_answer(span, unicodedata.normalize(next(form), output), row(target)).sums
        expected = metrics.f1_score(wanted, found, zero_division=0)
        assert micro_f1(np.array(score, dtype=float)) == pytest.approx(expected)


def row(target):
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": target}]
    return Conversation(messages, where="d.jsonl:7", fields={})


def test_rank_correlation_and_intervals_are_scipy_s():
    stats = pytest.importorskip("scipy.stats", reason="scikit-learn brings SciPy")
    rng = np.random.default_rng(3)
    for _ in range(200):
        one, other = rng.integers(0, 6, size=(2, 12))
        found = spearman(one.tolist(), other.tolist())
        assert found == pytest.approx(stats.spearmanr(one, other).statistic)
    for _ in range(5):
        scores = rng.random(80) ** 3
        found = bootstrap_interval(scores)
        expected = stats.bootstrap((scores,), np.mean, n_resamples=20_000, rng=rng)
        low, high = expected.confidence_interval
        assert found.ends == pytest.approx((low, high), abs=0.06 * (high - low))
