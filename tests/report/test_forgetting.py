"""How far models moved from their base, in the tables and planes of a report."""

import json
import math
from xml.etree import ElementTree

import pytest
from run_folders import quickstart, write_json, write_lines

from dominie.core.run_records import read_run
from dominie.report import write_report
from dominie.report.forgetting import forgetting_planes
from dominie.report.tables import baseline_changes, results_grid

MOVED = {"distill": (0.0, 0.0), "expert": (2.51, 1.94), "align": (1.02, 0.0153)}
SOURCES = {"general": "general", "domain": "domain", "there": "domain", "elsewhere": "general"}


def moved(kl):
    ends = [math.exp(-1.2 * kl), math.exp(-0.8 * kl)]
    figures = {"kl": kl, "agreement": 0.9, "loss": 1.5, "metric": "forgetting", "n": 300}
    return {"score": math.exp(-kl), "interval": ends, **figures}


@pytest.fixture
def folder(tmp_path):
    run = quickstart(tmp_path)
    results = json.loads((run / "results.json").read_text())
    for model, (domain, general) in MOVED.items():
        results[model] |= {"there": moved(domain), "elsewhere": moved(general)}
    write_json(run / "results.json", results)
    write_json(run / "evaluation" / "scored.json", {"sources": SOURCES})
    return run


def test_a_plane_is_drawn_for_each_source_against_an_ability_of_another(folder):
    run = read_run(folder)
    assert run.ability_tasks == ("general", "domain")
    planes = forgetting_planes(run, "align")
    assert [(plane.moved, plane.ability) for plane in planes] == [
        ("there", "general"),
        ("elsewhere", "domain"),
    ]
    chart = ElementTree.fromstring(planes[0].chart)
    dots = {
        dot.find("title").text.split(":")[0]: (float(dot.attrib["cx"]), float(dot.attrib["cy"]))
        for dot in chart.iter("circle")
    }
    assert list(dots) == ["distill", "expert", "align"], "of those that were measured"
    assert dots["distill"][0] < dots["align"][0] < dots["expert"][0]
    assert dots["expert"][1] > dots["align"][1], "upwards is smaller"
    texts = [text.text for text in chart.iter("text")]
    assert {"KL on there, nats →", "general, % →", "0", "1", "2"} <= set(texts)
    crosses = [line for line in chart.iter("line") if "whisker" in line.attrib["class"]]
    assert len(crosses) == 2 * 3


def test_a_curve_and_a_sentence_tell_what_validation_found(folder):
    stage = folder / "align"
    lines = [
        {"step": step, "evaluation": {"domain": {"loss": 1.0, "forgetting": 0.01 * step}}}
        for step in (0, 10, 20)
    ]
    write_lines(stage / "metrics.jsonl", lines)
    record = json.loads((stage / "stage.json").read_text())
    write_json(stage / "stage.json", record | {"stopped": {"why": "it went <too> far", "step": 30}})
    page = write_report(folder).read_text(encoding="utf-8")
    assert page.count("Held-out KL from the start ") == 1
    assert "Held-out KL from the start. domain from 0 to 0.200" in page
    assert "stopped: it went &lt;too&gt; far" in page


def test_the_table_shows_nats_and_no_best(folder):
    run = read_run(folder)
    grid = results_grid(run)
    index = next(i for i, c in enumerate(grid.columns) if (c.task, c.key) == ("there", "score"))
    cells = {model: cells[index] for model, cells in grid.rows}
    assert grid.columns[index].label == "KL, nats"
    assert (cells["expert"].text, cells["expert"].interval) == ("2.51", "2.01–3.01")
    assert (cells["distill"].text, cells["distill"].interval) == ("0", "")
    assert cells["sft"].text == "–"
    assert {cell.mark for cell in cells.values()} == {""}
    assert [c.key for c in grid.columns if c.task == "there"] == ["score", "agreement", "loss"]
    assert all("there" not in steps for _, steps in baseline_changes(run))


def test_without_the_sources_of_tasks_or_a_second_model_there_is_no_plane(folder):
    def titled():
        return 'id="forgetting"' in write_report(folder).read_text(encoding="utf-8")

    assert titled()
    write_json(folder / "evaluation" / "scored.json", {"sources": {**SOURCES, "general": 3}})
    assert [plane.moved for plane in forgetting_planes(read_run(folder), None)] == ["elsewhere"]
    (folder / "evaluation" / "scored.json").unlink()
    assert not titled()
    write_json(folder / "evaluation" / "scored.json", {"sources": SOURCES})
    results = json.loads((folder / "results.json").read_text())
    write_json(folder / "results.json", {"align": results["align"]})
    assert not titled()
