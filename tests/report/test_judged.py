from xml.etree import ElementTree

from run_folders import CATEGORIES, JUDGED, entry, judged, write_json

from dominie.core.run_records import read_run
from dominie.report.bars import Bar, BarGroup, Spokes, bar_chart, radar_chart
from dominie.report.sections import judged_tasks


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


def test_bars_are_as_long_as_their_values():
    groups = [
        BarGroup("a", (Bar(0.8, "80.0", (0.7, 0.9)), Bar(0.4, "40.0", style="second"))),
        BarGroup("b", (Bar(0.0, "0.0"),)),
    ]
    chart = ElementTree.fromstring(bar_chart("t", groups, ticks=[(0.5, "50 %")], half=True))
    wide = [float(rect.attrib["width"]) for rect in chart.iter("rect")]
    assert wide[0] == 2 * wide[1]
    assert wide[2] == 0.5, "what is nothing can still be seen"
    assert [t.text for t in chart.iter("text")] == ["50 %", "a", "80.0", "40.0", "b", "0.0"]


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
