from dominie.core.run_reader import Sample
from dominie.report.sections import selection


def rows(correct, groups=None, prompts=None):
    return [
        Sample(
            prompts[i] if prompts else f"prompt {i}",
            "target",
            f"output {i}",
            float(right),
            groups[i] if groups else None,
        )
        for i, right in enumerate(correct)
    ]


def test_prompts_that_divide_the_models_come_first():
    chosen = selection(
        {
            "a": rows([True, True, False, True]),
            "b": rows([True, False, False, True]),
            "c": rows([True, False, False, False]),
            "d": rows([True, False, False, False]),
        },
        most=2,
        length=100,
    )
    assert (chosen.total, chosen.differing) == (4, 2)
    assert [comparison.prompt for comparison in chosen.shown] == ["prompt 3", "prompt 1"]
    assert [answer.model for answer in chosen.shown[0].answers] == ["a", "b", "c", "d"]
    assert [answer.score for answer in chosen.shown[0].answers] == [1, 1, 0, 0]


def test_every_family_has_its_turn():
    groups = ["x", "x", "x", "y"]
    chosen = selection(
        {"a": rows([True] * 4, groups), "b": rows([False] * 4, groups)}, most=3, length=100
    )
    assert [comparison.group for comparison in chosen.shown] == ["x", "y", "x"]


def test_where_all_agree_some_are_shown_all_the_same():
    chosen = selection({"a": rows([True, True]), "b": rows([True, True])}, most=6, length=100)
    assert (len(chosen.shown), chosen.differing) == (2, 0)


def test_models_are_joined_by_prompt_whatever_their_order():
    one = rows([True, False], prompts=["p", "q"])
    other = rows([True, True], prompts=["q", "p"])
    chosen = selection({"a": one, "b": other}, most=6, length=100)
    assert chosen.total == 2
    answers = {c.prompt: [a.score for a in c.answers] for c in chosen.shown}
    assert answers == {"q": [0, 1]}


def test_a_prompt_that_stands_twice_is_two_rows():
    twice = rows([True, False], prompts=["p", "p"])
    chosen = selection({"a": twice, "b": twice}, most=6, length=100)
    assert chosen.total == 2
    assert all(len(comparison.answers) == 2 for comparison in chosen.shown)


def test_long_texts_are_cut_and_say_so():
    long = [Sample("p" * 5000, "t", "o" * 10, 1.0)]
    (shown,) = selection({"a": long}, most=1, length=100).shown
    assert shown.prompt == "p" * 100 + "… [4,900 more characters]"
    assert shown.answers[0].output == "o" * 10


def test_ratings_that_lie_far_apart_come_first():
    def rated(*scores):
        return [Sample(f"prompt {i}", "", "o", score) for i, score in enumerate(scores)]

    chosen = selection({"a": rated(0.9, 0.2, 0.5, None), "b": rated(0.8, 0.9, 0.5, 0.1)}, 4, 100)
    assert [comparison.prompt for comparison in chosen.shown] == [
        "prompt 1",
        "prompt 0",
        "prompt 3",
    ]
    assert chosen.differing == 3


def test_a_verdict_is_cut_as_the_answer_is():
    judged = [Sample("p", "", "o", 0.7, verdict="v" * 300, invalid=True)]
    (shown,) = selection({"a": judged}, most=1, length=100).shown
    assert shown.answers[0].verdict == "v" * 100 + "… [200 more characters]"
    assert shown.answers[0].invalid
