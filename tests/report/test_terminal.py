import io

from rich.console import Console
from run_folders import entry, quickstart, write_json

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
    assert align.split()[2].startswith("±")
    assert "n = 350" in text
    assert "n = 300" in text


def test_markup_in_names_is_printed_as_it_is(tmp_path):
    write_json(tmp_path / "results.json", {"[red]a[/red]": {"[b]t": entry(0.5)}})
    text = printed(tmp_path)
    assert "[red]a[/red]" in text
    assert "[b]t" in text


def test_a_run_without_results_says_so(tmp_path):
    (tmp_path / "recipe.yaml").write_text("name: a")
    assert printed(tmp_path).strip() == "Nothing has been trained or evaluated yet."
