from dominie.report.compare import pareto_front


def test_the_front_is_what_nothing_beats_from_left_to_right():
    places = {
        "teacher": (0.98, 0.0),
        "distill": (0.88, 0.0),
        "align": (0.88, 0.91),
        "expert": (0.02, 0.92),
        "merged": (0.5, 0.5),
    }
    assert pareto_front(places) == ["expert", "align", "teacher"]


def test_names_in_one_place_share_it():
    assert pareto_front({"a": (0.5, 0.5), "b": (0.5, 0.5), "c": (0.5, 0.4)}) == ["a", "b"]


def test_of_nothing_there_is_none():
    assert pareto_front({}) == []
