"""Judged benchmarks through the command line: local models, endpoints, kills, and bad recipes."""

from __future__ import annotations

import json
import signal
import sys
import time
import warnings
import zlib
from pathlib import Path

import pytest
from fault_server import Answer, reply, shown_answers
from forks import Fork

from dominie import cli
from dominie.core.errors import InputError
from dominie.generation.reply_log import read_reply
from dominie.recipe import load_recipe
from dominie.toyworld.toy_models import save_model

CATEGORIES = [
    "writing",
    "roleplay",
    "reasoning",
    "math",
    "coding",
    "extraction",
    "stem",
    "humanities",
]


def write_lines(path: Path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_recipe(path: Path, tree) -> Path:
    with path.open("w") as file:
        json.dump(tree, file)  # which is YAML, in this order
    return path


def mt_bench_files(folder: Path, count: int) -> dict[str, str]:
    """Questions and references in upstream's shape."""
    questions = [
        {
            "question_id": 81 + i,
            "category": CATEGORIES[i % len(CATEGORIES)],
            "turns": [f"copy red {i}", f"copy blue {i}"],
        }
        for i in range(count)
    ]
    write_lines(folder / "question.jsonl", questions)
    references = [
        {"question_id": q["question_id"], "choices": [{"index": 0, "turns": ["red", "blue"]}]}
        for q in questions
    ]
    write_lines(folder / "reference.jsonl", references)
    return {"questions": "question.jsonl", "references": "reference.jsonl"}


def start(recipe: Path, *more: str) -> Fork:
    return Fork("evaluate", recipe, *more, cwd=recipe.parent)


@pytest.fixture
def finish(monkeypatch, capsys):
    """Evaluates a recipe in this process, which is quicker to start."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def run(recipe: Path, *more: str, status: int = 0) -> tuple[str, str]:
        monkeypatch.chdir(recipe.parent)
        monkeypatch.setattr(sys, "argv", ["dominie", "evaluate", str(recipe), *more])
        with warnings.catch_warnings(), pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capsys.readouterr()
        assert left.value.code == status, out + err
        assert "Traceback" not in out + err
        return out, err

    yield run
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


def grade(asked) -> Answer:
    """A judge that likes long answers and echoes what it reads, or a model that answers."""
    answers = shown_answers(asked.text)
    if not answers:
        return reply(f"an answer to {asked.body['messages'][-1]['content']}")
    return reply(f"{answers[-1]} Grade: [[{min(10, 1 + len(answers[-1]) // 8)}]] {answers[-1]}")


def run_folder(recipe: Path) -> Path:
    return recipe.parent / "runs" / recipe.stem


def faulty(asked) -> Answer:
    """Every other request goes wrong at first; only a judge that talks nonsense is paid for it."""
    kind = zlib.crc32(asked.text.encode()) % 12
    rarely = zlib.crc32(asked.text.encode()[::-1]) % 8 == 0  # a time-out takes its time
    if asked.before == 0 and kind < 5 and (kind != 2 or rarely):
        hanging = Answer(body="late", hang=11.0)
        cut = Answer(body=grade(asked).body, cut=True)
        return [Answer(429, "", {"retry-after": "0.01"}), Answer(500), hanging, cut, Answer(503)][
            kind
        ]
    if asked.before == 0 and kind == 5 and shown_answers(asked.text):
        return Answer(**{**reply("Grade: [[99]]").__dict__, "hang": 0.01})
    return Answer(**{**grade(asked).__dict__, "hang": 0.02})


@pytest.mark.full
def test_80_questions_killed_twice_no_call_paid_twice_and_none_lost(serve, tmp_path, finish):
    server = serve(faulty)
    there = {"endpoint": server.url, "concurrency": 8, "backoff": 0.01, "timeout": 10.0}
    recipe = write_recipe(
        tmp_path / "mt.yaml",
        {
            "evaluate": {
                "endpoints": {"it": {**there, "model": "answers"}},
                "benchmarks": {
                    "mt": {**mt_bench_files(tmp_path, 80), "judge": {**there, "model": "judges"}}
                },
            }
        },
    )
    # Once amid the answers, once amid the verdicts.
    for after in (60, 230):
        process = start(recipe)
        while sum(server.paid.values()) < after and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 143, err
        assert "interrupted by SIGTERM" in err
    finish(recipe)
    run = run_folder(recipe)
    result = json.loads((run / "results.json").read_text())["it"]["mt"]
    assert result["n"] == 80
    assert result["unscored"] == 0
    assert set(result["groups"]) == set(CATEGORIES)
    answered = whole_replies(run / "evaluation" / "it" / "replies.jsonl")
    judged = whole_replies(run / "evaluation" / "mt.replies.jsonl")
    assert len(answered) == 160
    assert len(answered) + len(judged) == sum(server.paid.values())  # none lost
    useful = [text for text in answered + judged if "[[99]]" not in text]
    assert len(useful) == len(server.paid)  # and not one of them twice
    assert len(useful) < len(answered + judged), "nonsense was paid for, once, and asked again"
    assert sum(server.asked.values()) > 1.2 * len(useful), "most faults were met"
    lines = (run / "evaluation" / "it" / "mt" / "answers.jsonl").read_text().splitlines()
    answers = [json.loads(line) for line in lines]
    assert [a["question_id"] for a in answers] == list(range(81, 161))
    expected = ["an answer to copy red 3", "an answer to copy blue 3"]
    assert answers[3]["choices"][0]["turns"] == expected
    paid = dict(server.paid)
    finish(recipe)
    assert dict(server.paid) == paid


def whole_replies(ledger: Path) -> list[str]:
    """What was said, by every record of a whole reply."""
    records = [json.loads(line) for line in ledger.read_text().splitlines()]
    replies = [read_reply(r["body"]) for r in records if r["status"] == 200]
    return [reply.text for reply in replies if reply is not None]


@pytest.mark.parametrize("gateway", [pytest.param(False, marks=pytest.mark.full), True])
def test_a_kill_without_warning_costs_at_most_what_was_under_way(serve, tmp_path, finish, gateway):
    def slower_and_slower(asked):
        hang = 0.02 if sum(server.paid.values()) < 20 else 0.9
        return Answer(**{**grade(asked).__dict__, "hang": hang})

    server = serve(slower_and_slower)
    if gateway:
        server.remembered = set()
    there = {"endpoint": server.url, "concurrency": 3, "backoff": 0.01}
    recipe = write_recipe(
        tmp_path / "mt.yaml",
        {
            "evaluate": {
                "endpoints": {"it": {**there, "model": "answers"}},
                "benchmarks": {
                    "mt": {
                        **mt_bench_files(tmp_path, 20),
                        "judge": {**there, "model": "judges"},
                        "control_questions": 2,
                    }
                },
            }
        },
    )
    process = start(recipe)
    while sum(server.paid.values()) < 20 and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.3)  # those under way take longer
    process.kill()
    process.communicate()
    server.behave = grade
    ledger = run_folder(recipe) / "evaluation" / "it" / "replies.jsonl"
    with ledger.open("ab") as file:
        file.write(b'{"key": "torn')
    finish(recipe)
    twice = [count for count in server.paid.values() if count > 1]
    assert len(twice) <= (0 if gateway else 3)
    assert max(server.paid.values()) <= 2
    assert max(server.asked.values()) == 2, "something was under way"
    for line in ledger.read_text().splitlines():
        json.loads(line)


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "m"
    save_model("student", folder, seed=0)
    return folder


def local_recipe(folder: Path, toy: Path, url: str, **judge) -> Path:
    baseline = [
        {"instruction": f"copy {i}", "output": "green " * 4, "generator": "g", "dataset": "d"}
        for i in range(8)
    ]
    (folder / "base.json").write_text(json.dumps(baseline))
    judge = {"endpoint": url, "model": "judges", "backoff": 0.01, **judge}
    common = {"judge": judge, "max_new_tokens": 6, "control_questions": 3}
    return write_recipe(
        folder / "local.yaml",
        {
            "evaluate": {
                "models": {"toy": str(toy)},
                "benchmarks": {
                    "mt": {**mt_bench_files(folder, 8), **common},
                    "alpaca": {
                        "kind": "alpaca_eval",
                        "version": 1,
                        "baseline": "base.json",
                        **common,
                    },
                },
            }
        },
    )


def both(asked) -> Answer:
    """Rates, or prefers the longer."""
    answers = shown_answers(asked.text)
    if "answer A" in asked.text:
        return reply(f"[[{'A' if len(answers[0]) > len(answers[1]) else 'B'}]]")
    return grade(asked)


def test_a_local_model_on_both_benchmarks(serve, tmp_path, toy, finish):
    server = serve(both)
    recipe = local_recipe(tmp_path, toy, server.url)
    out, _ = finish(recipe)
    run = run_folder(recipe)
    results = json.loads((run / "results.json").read_text())["toy"]
    assert list(results) == ["mt", "alpaca"]
    for result in results.values():
        assert 0 <= result["interval"][0] <= result["score"] <= result["interval"][1] <= 1
        assert {"empty", "constant", "length_only"} <= set(result["controls"])
        assert result["controls"]["constant"]["n"] == 3
        assert result["unscored"] == 0
    assert results["alpaca"]["controls"]["length_only"]["longer_answer_wins"] == 1.0
    assert results["alpaca"]["controls"]["empty"]["score"] == 0.0
    assert any("longer answer won" in warning for warning in results["alpaca"]["warnings"])
    assert "longer answer won" in out
    assert (run / "report.html").exists()
    # A second time nothing is loaded, generated or asked.
    asked = sum(server.asked.values())
    answers = (run / "evaluation" / "toy" / "mt" / "answers.jsonl").read_bytes()
    finish(recipe)
    assert sum(server.asked.values()) == asked
    assert (run / "evaluation" / "toy" / "mt" / "answers.jsonl").read_bytes() == answers
    again = json.loads((run / "results.json").read_text())["toy"]
    assert again == results


def test_a_headline_needs_95_percent(serve, tmp_path, toy, finish):
    def partly(asked):
        if "blue 3" in asked.text:
            return Answer(400, "too long a text")
        return both(asked) if "red 3" not in asked.text else reply("I would rather not.")

    server = serve(partly)
    recipe = local_recipe(tmp_path, toy, server.url)
    _, err = finish(recipe, status=1)
    assert "too few verdicts for a figure: calls to the judge failed" in err
    assert "toy on mt: 14 of 16 (" in err
    assert "without a verdict: 1" in err
    assert "a call failed: 1" in err
    assert "HTTP 400: too long a text" in err
    run = run_folder(recipe)
    results = json.loads((run / "results.json").read_text())["toy"]
    assert list(results) == ["alpaca"]
    server.behave = both
    before = dict(server.asked)
    unscored = {key for key in before if "red 3" in key}
    assert len(unscored) == 2  # the two turns of that question
    assert sorted(before[key] for key in unscored) == [1, 3]  # what can be tried again is
    finish(recipe)
    assert {key for key, n in before.items() if server.asked[key] > n} == unscored
    assert list(json.loads((run / "results.json").read_text())["toy"]) == ["mt", "alpaca"]


FILTERED = json.dumps({"error": {"message": "content management policy", "code": 400}})


def refusing(*words: str, status: int = 400):
    """Judges, and answers all but the questions with these words, which a filter refuses."""

    def behave(asked) -> Answer:
        asked_for = asked.body["messages"][0]["content"]
        if any(word in asked_for for word in words) and not shown_answers(asked.text):
            return Answer(status, FILTERED) if status != 200 else reply("I", finish_reason="safety")
        return grade(asked)

    return behave


@pytest.mark.parametrize("status", [400, 200])
def test_a_refused_question_costs_no_model_its_figure(serve, tmp_path, finish, status):
    few = serve(refusing("red 7", status=status))
    most = serve(refusing("red 1", "red 2", "red 3", status=status))
    there = {"model": "m", "backoff": 0.01, "concurrency": 2}
    tree = {
        "evaluate": {
            "endpoints": {
                "most": {**there, "endpoint": most.url},
                "few": {**there, "endpoint": few.url},
                "dead": {**there, "endpoint": "http://127.0.0.1:9/v1", "retries": 0},
            },
            "benchmarks": {
                "mt": {
                    **mt_bench_files(tmp_path, 24),
                    "control_questions": 1,
                    "judge": {**there, "endpoint": few.url},
                }
            },
        }
    }
    recipe = write_recipe(tmp_path / "refused.yaml", tree)
    for again in (False, True):
        before = dict(few.asked)
        _, err = finish(recipe, status=2)  # that of the endpoint that cannot be reached
        assert "evaluate.endpoints.dead: the endpoint cannot be reached" in err
        results = json.loads((run_folder(recipe) / "results.json").read_text())
        assert list(results) == ["most", "few", "dead"]
        assert [list(of_model) for of_model in results.values()] == [[], ["mt"], []]
        figures = results["few"]["mt"]
        assert figures["unanswered"] == pytest.approx(1 / 24)
        assert figures["unscored"] == 2, "both turns of a question"
        warning = figures["warnings"][0]
        assert "1 of 24 questions were not answered" in warning
        assert "copy red 7" in warning
        assert ("content management policy" if status == 400 else "content filter") in warning
        assert (run_folder(recipe) / "report.html").exists()
        if again:
            asked = {key for key, n in few.asked.items() if n > before.get(key, 0)}
            assert asked, "what was refused is asked for again"
            assert all("red 7" in key for key in asked)
    del tree["evaluate"]["endpoints"]["dead"]
    _, err = finish(write_recipe(recipe, tree), status=1)
    assert "too few questions were answered" in err
    assert "most on mt" in err


def test_thoughts_are_not_judged_and_broken_answers_are_counted_aloud(serve, tmp_path, finish):
    def behave(asked) -> Answer:
        if shown := shown_answers(asked.text):
            assert "<think>" not in "".join(shown)
            return grade(asked)
        last = asked.body["messages"][-1]["content"]
        assert "<think>" not in asked.text, "nor shown to the model in the second turn"
        if last == "copy red 0":
            return reply("<think>\nred or", finish_reason="length")
        if last == "copy red 1":
            return reply("An answer that", finish_reason="length")
        if last == "copy red 2" and asked.before == 0:
            return reply("An ans", finish_reason="error")
        return reply("<think>\nWhich colour?\n</think>\n\nRed.")

    server = serve(behave)
    there = {"endpoint": server.url, "model": "m", "backoff": 0.01}
    questions = {**mt_bench_files(tmp_path, 8), "control_questions": 1, "judge": there}
    tree = {"evaluate": {"endpoints": {"it": there}, "benchmarks": {"mt": questions}}}
    recipe = write_recipe(tmp_path / "thoughts.yaml", tree)
    out, _ = finish(recipe)
    answers = run_folder(recipe) / "evaluation" / "it" / "mt" / "answers.jsonl"
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    turns = [row["choices"][0]["turns"] for row in rows]
    assert turns == [["", "Red."], ["An answer that", "Red."], *[["Red.", "Red."]] * 6]
    assert [row["stops"][0] for row in rows] == ["length", "length", *["stop"] * 6]
    assert rows[3]["thoughts"] == ["Which colour?"] * 2
    figures = json.loads((run_folder(recipe) / "results.json").read_text())["it"]["mt"]
    assert (figures["cut"], figures["empty"]) == (2 / 16, 1 / 16)
    for words in ("12 % of answers were cut off", "6 % of answers are empty"):
        assert any(words in warning for warning in figures["warnings"])
        assert words in out
    report = (run_folder(recipe) / "report.html").read_text()
    assert "of answers were cut off" in report
    assert "12.5 % cut off, 6.2 % empty" in report
    assert sum(server.asked.values()) == len(server.asked) + 1, "an error was asked for again"
    questions["keep_thoughts"] = True
    server.behave = lambda asked: reply("Grade: [[5]]" if shown_answers(asked.text) else "unasked")
    kept = sum(server.asked.values())
    finish(write_recipe(recipe, tree), status=0)
    turns = [json.loads(line)["choices"][0]["turns"] for line in answers.read_text().splitlines()]
    assert turns[0][0] == "<think>\nred or", "read again from the log"
    assert sum(server.asked.values()) > kept, "the second turns follow on other answers"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("evaluate.benchmarks.mt.judge.budget.calls=0", "buys nothing"),
        ("evaluate.benchmarks.mt.kind=mt_bank", "mt_bench, alpaca_eval"),
        ("evaluate.benchmarks.mt.qestions=x", "did you mean questions"),
        ("evaluate.benchmarks.mt.judge.modl=x", "did you mean model"),
        ("evaluate.benchmarks.mt.judge.endpoint=here", "http://localhost:8000/v1"),
        ("evaluate.benchmarks.mt.questions=nowhere.jsonl", "no such file of questions"),
        ("evaluate.benchmarks.mt.judge.key_env=NOT_SET_ANYWHERE", "export NOT_SET_ANYWHERE"),
        ("evaluate.endpoints.toy={endpoint: 'http://h/v1', model: m}", "of a model and of an endp"),
        (
            "evaluate.benchmarks.mt.judge.request={a: {api-key: x1y2z3}}",
            "a.api-key looks like a",
        ),
        ("evaluate.benchmarks.mt.judge.concurrency=many", "a whole number"),
    ],
)
def test_bad_recipes_are_one_message(tmp_path, toy, override, words, finish):
    recipe = local_recipe(tmp_path, toy, "http://127.0.0.1:9/v1")
    _, err = finish(recipe, override, status=2)
    assert err.count("error: ") == 1
    assert words in err


@pytest.mark.parametrize("name", ["replies", "Replies"])
def test_no_benchmark_is_written_over_the_replies_of_an_endpoint(tmp_path, name):
    there = {"endpoint": "http://127.0.0.1:9/v1", "model": "m"}
    benchmark = {**mt_bench_files(tmp_path, 1), "judge": there}
    tree = {"evaluate": {"endpoints": {"it": there}, "benchmarks": {name: benchmark}}}
    with pytest.raises(InputError, match="overwrite the replies of endpoints"):
        load_recipe(write_recipe(tmp_path / "r.yaml", tree))
    tree["evaluate"] = {"models": {"it": "toyworld:student"}, "benchmarks": {name: benchmark}}
    load_recipe(write_recipe(tmp_path / "r.yaml", tree))


@pytest.mark.parametrize("name", ["comparisons.JSON", "Rows.Jsonl", "EVALUATION"])
def test_names_of_files_are_no_names_on_file_systems_without_capitals(tmp_path, name):
    there = {"endpoint": "http://127.0.0.1:9/v1", "model": "m"}
    benchmark = {**mt_bench_files(tmp_path, 1), "judge": there}
    tree = {"evaluate": {"endpoints": {name: there}, "benchmarks": {"mt": benchmark}}}
    with pytest.raises(InputError, match="not usable as a name"):
        load_recipe(write_recipe(tmp_path / "r.yaml", tree))
