from itertools import combinations
from xml.etree import ElementTree

from dominie.report.scatter import PERCENT, RATING, Mark, scatter_chart

QUICKSTART = [
    Mark("untrained", 0.0, 0.0, (0.0, 0.01), (0.0, 0.01), trained=False),
    Mark("teacher", 0.879, 0.113, (0.84, 0.90), (0.07, 0.15)),
    Mark("sft", 0.640, 0.060, (0.59, 0.69), (0.03, 0.10)),
    Mark("distill", 0.769, 0.073, (0.72, 0.81), (0.04, 0.11)),
    Mark("expert", 0.306, 0.834, (0.26, 0.36), (0.79, 0.87)),
    Mark("align", 0.763, 0.799, (0.72, 0.81), (0.75, 0.84), chosen=True),
]
ARROWS = [("untrained", "sft"), ("untrained", "distill"), ("distill", "align")]


def drawn(marks, arrows=()):
    return ElementTree.fromstring(scatter_chart("general", "domain", marks, list(arrows)))


def labels(chart):
    """The boxes of the models' names: left, top, right, bottom."""
    boxes = []
    for text in chart.iter("text"):
        if not text.attrib.get("class", "").startswith("label"):
            continue
        wide, x, y = 7.0 * len(text.text), float(text.attrib["x"]), float(text.attrib["y"])
        left = x - {"start": 0, "middle": wide / 2, "end": wide}[text.attrib["text-anchor"]]
        boxes.append((left, y - 11, left + wide, y + 3))
    return boxes


def test_every_model_is_a_point_with_a_name_and_the_right_order():
    chart = drawn(QUICKSTART, ARROWS)
    dots = {
        dot.find("title").text.split(":")[0]: (float(dot.attrib["cx"]), float(dot.attrib["cy"]))
        for dot in chart.iter("circle")
    }
    assert list(dots) == [mark.name for mark in QUICKSTART]
    assert dots["teacher"][0] > dots["distill"][0] > dots["sft"][0] > dots["expert"][0]
    assert dots["expert"][1] < dots["align"][1] < dots["teacher"][1]  # upwards is smaller


def test_names_cover_neither_each_other_nor_the_edge():
    boxes = labels(drawn(QUICKSTART, ARROWS))
    assert len(boxes) == len(QUICKSTART)
    for one, other in combinations(boxes, 2):
        wide = min(one[2], other[2]) - max(one[0], other[0])
        high = min(one[3], other[3]) - max(one[1], other[1])
        assert wide <= 0 or high <= 0, (one, other)
    assert all(left >= 50 and right <= 645 for left, _, right, _ in boxes)


def test_ratings_are_from_1_to_10():
    chart = ElementTree.fromstring(
        scatter_chart("mt", "domain", QUICKSTART, [], units=(RATING, PERCENT))
    )
    texts = [text.text for text in chart.iter("text")]
    assert "mt, of 10 →" in texts
    assert "domain, % →" in texts
    assert {"8", "80"} <= set(texts)


def test_models_in_one_place_have_names_apart():
    marks = [Mark(f"model-{index}", 0.5, 0.5) for index in range(4)]
    boxes = labels(drawn(marks))
    assert len({(round(left), round(top)) for left, top, _, _ in boxes}) == 4


def test_arrows_are_drawn_between_points_that_are_apart():
    assert len(drawn(QUICKSTART, ARROWS).findall(".//g[@class='arrow']")) == 3
    near = [Mark("a", 0.5, 0.5), Mark("b", 0.5, 0.5), Mark("c", 0.9, 0.9)]
    assert len(drawn(near, [("a", "b")]).findall(".//g[@class='arrow']")) == 0


def test_a_model_that_was_not_trained_is_hollow():
    hollow = [dot for dot in drawn(QUICKSTART).iter("circle") if "given" in dot.attrib["class"]]
    assert [dot.find("title").text.split(":")[0] for dot in hollow] == ["untrained"]
