import base64
import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from run_folders import entry, judged, quickstart, write_json, write_lines

from dominie.core.errors import InputError
from dominie.report import write_report
from dominie.report.page import SIZE_LIMIT

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """A page as elements, its ids and links, and whether its tags are balanced."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.script = ""
        self.unbalanced: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        self.unbalanced += self._open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if self._open and self._open[-1] == tag:
            self._open.pop()
        else:
            self.unbalanced.append(f"/{tag}")

    def handle_data(self, data):
        if self._open[-1:] == ["script"]:
            self.script += data
        elif self._open[-1:] != ["style"]:
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def words(self):
        return " ".join(self.text.split())


def page_of(run) -> Page:
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert page.unbalanced == []
    return page


def figures(page: Page) -> list[str]:
    return [attributes.get("id") for attributes in page.all("figure")]


def test_answers_that_are_none_are_counted_below_the_score_and_take_no_column(tmp_path):
    scores = {
        "a": {"t": entry(0.5, invalid=0.125, cut=0.25), "u": entry(0.5)},
        "b": {"t": entry(0.6)},
    }
    write_json(tmp_path / "results.json", scores)
    page = page_of(tmp_path)
    assert "12.5 % invalid, 25.0 % cut off" in page.words
    assert len([each for each in page.all("span") if each.get("class") == "rates"]) == 1
    assert "invalid, %" not in page.words
    assert "cut off, %" not in page.words


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return quickstart(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def page(finished):
    return page_of(finished)


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def test_every_part_is_there(page):
    assert "align keeps" in page.words
    sections = [attributes["id"] for attributes in page.all("section")]
    assert sections == [
        "opening",
        "results",
        "curves",
        "families",
        "samples",
        "stages",
        "data",
        "recipe",
    ]
    assert len([svg for svg in page.all("svg") if svg.get("class") == "chart"]) == 5 + 5 + 2
    assert "scatter" in figures(page)
    assert "share: 0.9, teacher: distill" in page.words
    assert "2.13.0+cpu" in page.words


def test_judged_tasks_have_a_radar_bars_and_their_controls(tmp_path):
    page = page_of(judged(tmp_path))
    assert "judged" in [attributes["id"] for attributes in page.all("section")]
    drawings = [svg.get("class") for svg in page.all("svg")]
    assert drawings.count("radar") == 1
    assert drawings.count("bars") == 2
    assert len([r for r in page.all("rect") if "control" in r["class"]]) == 3, "empty twice"
    assert len([r for r in page.all("rect") if "second" in r["class"]]) == 4, "at equal length"
    assert "the judge is of the model's family" in page.words
    assert "Rating: [[7]]" in page.words, "a verdict beside its answer"
    radar = next(svg for svg in page.all("svg") if svg.get("class") == "radar")
    assert "align: writing" in radar["aria-label"]


def test_differences_from_the_baseline_are_in_words(tmp_path):
    page = page_of(judged(tmp_path))
    assert "Over sft, in points (of ratings: of 10)" in page.words
    assert "within noise" in page.words
    assert "no valid answer" not in page.words


def test_the_page_needs_nothing_from_outside(page, finished):
    for tag, attributes in page.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "form"), tag
        assert not {"src", "srcset", "data", "action"} & attributes.keys(), tag
        assert (attributes.get("href") or "#").startswith("#")
    html = (finished / "report.html").read_text(encoding="utf-8")
    assert "http" not in html.replace("http-equiv", "")
    assert "url(" not in html
    assert "@import" not in html
    assert len(html.encode()) < 300_000


def test_the_opening_shows_what_was_learned_and_what_was_kept(page):
    opening = page.words.partition("Results Scores")[0]
    assert re.search(r"general \d+\.\d.% → \d+\.\d.% within noise domain", opening)
    assert re.search(r"domain \d+\.\d.% → \d+\.\d.% \+\d+\.\d points", opening)


def unsolved(folder, *, agreements):
    """A run in which no model solves anything yet, compared with a teacher on some sources."""
    results = json.loads((quickstart(folder) / "results.json").read_text())
    for scores in results.values():
        agreement = scores.pop("agreement")
        for task in scores:
            scores[task] = {**entry(0.0, 0.0, 350), "metric": "exact_match"}
        scores.update({f"agreement-{n}": agreement for n in range(agreements)})
    write_json(folder / "quickstart" / "results.json", results)
    return folder / "quickstart"


def test_if_nothing_is_solved_the_opening_shows_agreement(tmp_path):
    one = page_of(unsolved(tmp_path / "one", agreements=1))
    assert "scatter" not in figures(one), "all points would lie in one corner"
    assert "agrees with the teacher on" in one.words
    assert re.search(r"agreement-0 \d+\.\d.% → \d+\.\d.%", one.words)
    two = page_of(unsolved(tmp_path / "two", agreements=2))
    assert "scatter" in figures(two)
    assert "agreement-1 against agreement-0" in two.words


def test_answers_of_a_model_can_be_left_out(page, finished):
    boxes = [each["id"] for each in page.all("input") if each.get("type") == "checkbox"]
    assert boxes == [f"show-{number}" for number in range(6)]
    assert all("checked" in each for each in page.all("input"))
    html = (finished / "report.html").read_text(encoding="utf-8")
    for number in range(6):
        assert f":has(#show-{number}:not(:checked)) .by-{number} {{ display: none; }}" in html
        assert any(f"by-{number}" in (each.get("class") or "") for each in page.all("li"))


def test_changes_from_the_baseline_stand_once(tmp_path):
    page = page_of(judged(tmp_path))
    assert "Over sft" in page.words
    assert "distill → align" in page.words, "no step from the baseline: in its own table"


def test_held_out_losses_share_an_axis_over_stages(page):
    held_out = [
        svg["data-y"]
        for svg in page.all("svg")
        if (svg.get("aria-label") or "").startswith("Held-out loss")
    ]
    assert len(held_out) == 5
    assert len(set(held_out)) == 1


def test_links_lead_somewhere_and_ids_are_unique(page):
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {attributes["href"][1:] for attributes in page.all("a")}
    labelled = {a["aria-labelledby"] for _, a in page.elements if "aria-labelledby" in a}
    assert targets <= set(ids)
    assert labelled <= set(ids)


def test_the_policy_allows_the_one_script_and_no_other(page):
    assert len(page.all("script")) == 1
    digest = base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv"))
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")


def test_figures_and_tables_are_named_for_screen_readers(page):
    for attributes in page.all("svg"):
        named = attributes.get("role") == "img" and attributes.get("aria-label")
        assert named or attributes.get("aria-hidden") == "true"
    assert all("scope" in attributes for attributes in page.all("th"))
    assert all("aria-label" in a and a["tabindex"] == "0" for a in page.all("div") if "role" in a)
    assert page.all("html")[0]["lang"] == "en"
    assert [tag for tag, _ in page.elements].count("h1") == 1


def test_drawings_are_well_formed(finished):
    html = write_report(finished).read_text(encoding="utf-8")
    drawings = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(drawings) > 20
    for drawing in drawings:
        ElementTree.fromstring(drawing)


HOSTILE = '</pre></script><script>alert(1)</script><img src=x onerror="alert(2)">{{ 7*7 }}'


def test_whatever_a_model_writes_is_text(tmp_path):
    name = HOSTILE.replace("/", "|")
    families = {f"{HOSTILE}{i}": entry(0.5) for i in range(4)}
    hostile = {"groups": families, "measure": HOSTILE, "warnings": [HOSTILE]}
    hostile["controls"] = {HOSTILE: 0.1}
    rated, won = {**hostile, "metric": "mt_bench"}, {**hostile, "metric": "alpaca_eval"}
    results = {
        name: {name: entry(0.5, **hostile), HOSTILE: entry(0.4, **rated), "w": entry(0.5, **won)},
        "b": {name: entry(0.2)},
    }
    pair = {"difference": 0.3, "interval": [0.1, 0.5], "verdict": HOSTILE}
    comparisons = {"baseline": name, "differences": {name: {"b": {name: pair}}}}
    write_json(tmp_path / "evaluation" / "comparisons.json", comparisons)
    write_json(tmp_path / "results.json", results)
    (tmp_path / "recipe.yaml").write_text(HOSTILE)
    row = {"prompt": HOSTILE, "target": HOSTILE, "output": HOSTILE, "group": HOSTILE}
    judged_row = {**row, "score": 0.7, "verdict": HOSTILE, "invalid": True}
    rows = [{**row, "correct": True}, {**judged_row, "prompt": "?"}]
    write_lines(tmp_path / "evaluation" / name / f"{name}.jsonl", rows)
    stage = {
        "status": HOSTILE,
        "student": HOSTILE,
        "kind": HOSTILE,
        "description": HOSTILE,
        "models": [HOSTILE],
        "teachers": {HOSTILE: HOSTILE},
        "data": {HOSTILE: {"read": 1}},
        "versions": {HOSTILE: HOSTILE},
    }
    write_json(tmp_path / "stage" / "stage.json", stage)
    line = {"step": 1, "loss": 1.0, "terms": {HOSTILE: 1.0, "b": 1.0}}
    line["sources"] = {HOSTILE: {"divergence": 1.0}}
    write_lines(tmp_path / "stage" / "metrics.jsonl", [line])
    page = page_of(tmp_path)
    assert len(page.all("script")) == 1
    assert page.all("img") == []
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)
    assert "alert(1)" in page.text
    assert {"results", "judged", "samples"} <= {each["id"] for each in page.all("section")}
    assert "no valid answer" in page.words
    assert "{{ 7*7 }}" in page.text


def test_a_stage_of_a_kind_that_nobody_knows_is_shown_by_what_it_wrote(copy):
    """Its name, its kind, its description and its data; stages that read them come after it."""
    stage = json.loads((copy / "align" / "stage.json").read_text())
    stage["data"] = {"written": {"kept": 7, "share": 1.0}, **stage["data"]}
    write_json(copy / "align" / "stage.json", stage)
    write_json(
        copy / "written" / "stage.json",
        {
            "name": "written",
            "status": "done",
            "fingerprint": "f",
            "kind": "answers",
            "description": "4 answers of served to each prompt of prompts",
            "student": "served",
            "models": ["served", "other"],
            "seconds": 12.0,
        },
    )
    write_lines(copy / "written" / "data" / "rows.jsonl", [{"messages": []}] * 100)
    page = page_of(copy)
    assert (
        "written answers served, other 4 answers of served to each prompt of prompts" in page.words
    )
    assert re.search(r"makes data/rows\.jsonl 1\.7.kB", page.words)
    assert "6 of 6" in page.words
    stages = page.words[page.words.rindex("Who learned what") :]
    assert stages.index(" written answers") < stages.index(" align distill")


def test_half_a_surrogate_pair_is_no_obstacle(copy):
    row = {"prompt": "p", "target": "t", "output": "\ud800 \x00 \u202e", "correct": False}
    write_lines(copy / "evaluation" / "align" / "general.jsonl", [row])
    assert "alert" not in page_of(copy).text


@pytest.mark.parametrize(
    ("missing", "text"),
    [
        (["results.json", "evaluation"], "No results yet."),
        (["evaluation"], "align keeps"),
        (["recipe.yaml"], "The resolved recipe was not saved"),
        (["align/stage.json"], "Stage align has not finished"),
        (["align/metrics.jsonl"], "align keeps"),
        (["teacher", "sft", "distill", "expert", "align"], "scores"),
        (["results.json", "evaluation", "recipe.yaml"], "5 stages done"),
    ],
)
def test_what_is_missing_is_left_out_and_noted(copy, missing, text):
    for name in missing:
        path = copy / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert text in page_of(copy).words


def test_a_recipe_alone_has_a_page(tmp_path):
    (tmp_path / "recipe.yaml").write_text("name: soon")
    page = page_of(tmp_path)
    assert "Nothing has been trained or evaluated yet." in page.words
    assert "name: soon" in page.text


def test_one_task_has_no_scatter(tmp_path):
    write_json(tmp_path / "results.json", {"a": {"t": entry(0.5)}, "b": {"t": entry(0.7)}})
    assert "scatter" not in figures(page_of(tmp_path))


def test_metrics_that_are_not_finite_leave_gaps(copy):
    lines = [{"step": step, "loss": math.nan if step < 50 else 1.0} for step in range(100)]
    write_lines(copy / "sft" / "metrics.jsonl", lines)
    page = page_of(copy)
    assert "was not finite at 50 logged steps" in page.words
    assert not any("nan" in (a.get("d") or "") for a in page.all("path"))


def test_a_huge_run_stays_below_a_megabyte(tmp_path):
    models = [f"a-long-model-name-number-{index:02d}" for index in range(24)]
    tasks = [f"task-{index}" for index in range(4)]
    groups = {f"family number {index}": entry(index / 60) for index in range(36)}
    write_json(
        tmp_path / "results.json",
        {model: {task: entry(0.5, groups=groups) for task in tasks} for model in models},
    )
    (tmp_path / "recipe.yaml").write_text("k: v\n" * 50_000)
    terms = {f"term-{index}": 1.0 + index for index in range(3)}
    for number, model in enumerate(models):
        lines = [
            json.dumps({"step": step, "loss": 3 + math.sin(step), "terms": terms})
            for step in range(500)
        ]
        (tmp_path / model).mkdir()
        (tmp_path / model / "metrics.jsonl").write_text("\n".join(lines))
        for task in tasks[:4]:
            row = {"prompt": "p" * 2000, "target": "<" * 2000, "output": "&" * 2000}
            rows = [{**row, "prompt": f"{i}" * 2000, "correct": number % 2 == 0} for i in range(9)]
            write_lines(tmp_path / "evaluation" / model / f"{task}.jsonl", rows)
    path = write_report(tmp_path)
    assert path.stat().st_size < SIZE_LIMIT
    page = Page(path.read_text(encoding="utf-8"))
    assert models[-1] in page.text
    sections = [attributes["id"] for attributes in page.all("section")]
    assert "families" not in sections, "there was room for less"
    assert {"curves", "samples"} <= set(sections)


def test_the_shares_of_a_mix_are_shown_and_what_is_short_of_the_loss_is_marked(copy):
    assert "short of the loss" in page_of(copy).words, "what it means"
    path = copy / "align" / "stage.json"
    record = json.loads(path.read_text())
    words = page_of(copy).words
    for source, of in record["data"].items():
        figures = [of[key] for key in ("share", "token_share", "loss_share")]
        assert source + "".join(f"{100 * each:.1f}" for each in figures) in words
    record["data"]["domain"] |= {"token_share": 0.004, "loss_share": 0.004}
    path.write_text(json.dumps(record))
    assert "domain short of the loss10.00.40.4" in page_of(copy).words
    del record["data"]["domain"]["loss_share"]  # of a run of the release before
    path.write_text(json.dumps(record))
    assert "Shares of the stages" not in page_of(copy).words


def test_writing_again_replaces_the_page_and_leaves_nothing_else(copy):
    before = {path.name for path in copy.iterdir()}
    (copy / "report.html").write_text("old")
    assert write_report(copy) == copy / "report.html"
    assert (copy / "report.html").read_text(encoding="utf-8") != "old"
    assert {path.name for path in copy.iterdir()} == before | {"report.html"}


def test_a_missing_run_is_the_users_error(tmp_path):
    with pytest.raises(InputError, match="no such run folder"):
        write_report(tmp_path / "nowhere")


def test_a_report_needs_no_torch():
    program = "import sys, dominie.report; print({'torch', 'numpy', 'rich'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
