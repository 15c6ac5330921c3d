import io

from rich.console import Console
from run_folders import entry, judged, quickstart, write_json

from dominie.report import results_table


def printed(run, width=100):
    console = Console(file=io.StringIO(), width=width, no_color=True)
    console.print(results_table(run))
    return console.file.getvalue()


def test_the_table_names_models_and_gives_scores_with_intervals(tmp_path):
    text = printed(quickstart(tmp_path))
    lines = text.splitlines()
    assert lines[0].startswith("align keeps")
    align = next(line for line in lines if line.startswith("align  "))
    assert "–" in align.split()[2]
    assert "n = 350" in text
    assert "n = 300" in text


def test_differences_from_the_baseline_are_in_words(tmp_path):
    text = printed(judged(tmp_path), width=200)
    below = text[text.index("points over") :].splitlines()
    assert below[1].split() == ["sft", "general", "domain", "mt-bench", "alpaca-eval"]
    assert "within noise (" in text
    assert " to +" in next(line for line in below if line.startswith("align"))
    assert not any(line.startswith("sft  ") for line in below[2:]), "not with itself"


def test_ratings_are_from_1_to_10_and_invalid_outputs_are_counted(tmp_path):
    rated = {**entry(0.762), "metric": "mt_bench", "interval": [0.7, 0.8]}
    write_json(tmp_path / "results.json", {"a": {"mt": rated, "t": entry(0.5, invalid=0.125)}})
    text = printed(tmp_path)
    assert "7.62 7.00–8.00" in text
    assert "invalid, %" in text
    assert "12.5" in text


def test_markup_in_names_is_printed_as_it_is(tmp_path):
    write_json(tmp_path / "results.json", {"[red]a[/red]": {"[b]t": entry(0.5)}})
    text = printed(tmp_path)
    assert "[red]a[/red]" in text
    assert "[b]t" in text


def test_a_run_without_results_has_a_headline_alone(tmp_path):
    (tmp_path / "recipe.yaml").write_text("name: a")
    assert printed(tmp_path).strip() == "Nothing has been trained or evaluated yet."
