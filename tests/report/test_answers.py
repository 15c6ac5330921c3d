from xml.etree import ElementTree

from run_folders import CATEGORIES, JUDGED, entry, judged, write_json

from dominie.core.run_reader import Sample
from dominie.core.run_records import read_run
from dominie.report.answers import Spokes, judged_tasks, radar_chart, selection


def test_a_radar_s_corners_lie_at_their_ratings():
    values = {"a": 1.0, "b": 0.5, "c": 0.0, "d": 0.5}
    chart = ElementTree.fromstring(radar_chart("t", list(values), [Spokes("m", values, "c0")]))
    corners = [
        (float(dot.attrib["cx"]), float(dot.attrib["cy"]))
        for dot in chart.iter("circle")
        if dot.attrib["class"].startswith("corner")
    ]
    middle = corners[2]
    assert middle == (220, 180), "nothing is the middle"
    assert corners[0] == (220, 52), "all of the first is straight up"
    assert corners[1] == (284, 180), "then clockwise"
    assert corners[3] == (156, 180)
    polygons = [p for p in chart.iter("polygon") if "series" in p.attrib["class"]]
    assert len(polygons) == 1


def test_a_category_that_was_not_rated_is_a_gap():
    categories = ["a", "b", "c", "d"]
    missing = Spokes("m", {"a": 1.0, "b": 0.5, "d": 0.5}, "c0")
    chart = ElementTree.fromstring(radar_chart("t", categories, [missing]))
    assert not [p for p in chart.iter("polygon") if "series" in p.attrib["class"]]
    assert len(list(chart.iter("polyline"))) == 2


def test_two_categories_are_no_radar():
    assert radar_chart("t", ["a", "b"], [Spokes("m", {"a": 1.0, "b": 0.5}, "c0")]) is None


def test_every_judged_task_is_drawn_with_its_controls(tmp_path):
    rated, won = judged_tasks(read_run(judged(tmp_path)), "align")
    assert rated.task == "mt-bench"
    assert rated.radar is not None
    assert all(category in rated.radar for category in CATEGORIES)
    assert [key.label for key in rated.keys] == list(JUDGED)
    assert "control: constant: 3.10" in rated.bars
    assert rated.warnings == (("sft", "the judge is of the model's family: mistral"),)
    assert won.controlled
    assert won.radar is None
    assert "teacher: 92.0, 88.0" in won.bars


def test_a_radar_has_room_for_six(tmp_path):
    groups = {category: entry(0.5) for category in CATEGORIES}
    results = {
        f"m{i}": {"mt": {**entry(i / 10), "metric": "mt_bench", "groups": groups}} for i in range(9)
    }
    write_json(tmp_path / "results.json", results)
    (task,) = judged_tasks(read_run(tmp_path), "m0")
    assert [key.label for key in task.keys] == ["m0", "m4", "m5", "m6", "m7", "m8"]
    assert task.left_out == 3


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
    assert list(chosen.shown[0].answers) == ["a", "b", "c", "d"]
    assert [answer.score for answer in chosen.shown[0].answers.values()] == [1, 1, 0, 0]


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
    answers = {c.prompt: [a.score for a in c.answers.values()] for c in chosen.shown}
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
    assert shown.answers["a"].output == "o" * 10


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
    assert shown.answers["a"].verdict == "v" * 100 + "… [200 more characters]"
    assert shown.answers["a"].invalid
