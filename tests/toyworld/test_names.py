"""What a name of the toy world makes, and what is said about a name it does not know."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from dominie.core.errors import InputError
from dominie.toyworld import is_toyworld, materialise
from dominie.toyworld.toy_models import WORDS

DATA = ("corpus", "general", "domain")


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def prompts(path: Path) -> list[str]:
    return [row["messages"][0]["content"] for row in rows(path)]


def answers(path: Path) -> list[str]:
    return [row["messages"][1]["content"] for row in rows(path)]


def content(folder: Path) -> dict[str, bytes]:
    if folder.is_file():
        return {folder.name: folder.read_bytes()}
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("toyworld")
    return {name: materialise(f"toyworld:{name}", folder) for name in DATA}


@pytest.mark.parametrize("name", DATA)
def test_rows_are_conversations_with_their_family(made: dict[str, Path], name: str) -> None:
    for row in rows(made[name]):
        assert set(row) == {"messages", "family"}
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert all(message["content"] for message in row["messages"])


@pytest.mark.parametrize("name", DATA)
def test_no_prompt_stands_twice(made: dict[str, Path], name: str) -> None:
    found = prompts(made[name])
    assert len(set(found)) == len(found)


def test_every_word_is_used_and_every_used_word_is_known(made: dict[str, Path]) -> None:
    texts = [text for name in DATA for text in (*prompts(made[name]), *answers(made[name]))]
    assert {word for text in texts for word in text.split(" ")} == set(WORDS)


def test_domain_words_occur_in_the_general_data(made: dict[str, Path]) -> None:
    def words(name: str) -> set[str]:
        return set(" ".join((*prompts(made[name]), *answers(made[name]))).split())

    assert words("domain") <= words("general")
    assert not set(prompts(made["domain"])) & set(prompts(made["corpus"]))


@pytest.mark.parametrize("name", DATA)
def test_families_have_equal_parts(made: dict[str, Path], name: str) -> None:
    families = [row["family"] for row in rows(made[name])]
    fair = len(families) / len(set(families))
    for family in set(families):
        assert families.count(family) == pytest.approx(fair, rel=0.25)


@pytest.mark.parametrize(
    "name",
    [
        "general?rows=50&noise=0.2",
        "domain?rows=50",
        "general?rows=50&lengths=unequal",
        "travel?rows=50&lengths=unequal",
        "student",
    ],
)
def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, name: str) -> None:
    first, again, other = (
        content(materialise(f"toyworld:{name}", tmp_path / folder, seed=seed))
        for folder, seed in (("first", 3), ("again", 3), ("other", 4))
    )
    assert first == again
    assert list(first.values()) != list(other.values())


def test_a_shorter_file_begins_a_longer_one(tmp_path: Path) -> None:
    short = materialise("toyworld:general?rows=40", tmp_path)
    longer = materialise("toyworld:general?rows=90", tmp_path)
    assert rows(longer)[:40] == rows(short)


def test_noise_is_wrong_answers_of_the_same_family(tmp_path: Path) -> None:
    clean, some, more = (
        materialise(f"toyworld:general?rows=1000&noise={noise}", tmp_path)
        for noise in (0, 0.1, 0.3)
    )
    assert prompts(clean) == prompts(some) == prompts(more)
    wrong_in_some, wrong_in_more = (
        {
            i
            for i, (right, a) in enumerate(zip(answers(clean), answers(path), strict=True))
            if a != right
        }
        for path in (some, more)
    )
    assert wrong_in_some < wrong_in_more
    assert len(wrong_in_some) == pytest.approx(100, abs=40)
    assert len(wrong_in_more) == pytest.approx(300, abs=60)
    assert all(answers(some)[i] == answers(more)[i] for i in wrong_in_some)


def test_what_is_there_is_used_again_and_what_is_damaged_made_anew(tmp_path: Path) -> None:
    path = materialise("toyworld:general?rows=20", tmp_path)
    made, first = path.read_bytes(), path.stat().st_mtime_ns
    assert materialise("toyworld:general?rows=20", tmp_path) == path
    assert path.stat().st_mtime_ns == first
    path.write_text("damaged")
    assert materialise("toyworld:general?rows=20", tmp_path) == path
    assert path.read_bytes() == made


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space"):
        materialise("toyworld:general?rows=20", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("toyworld:generel", "did you mean toyworld:general?"),
        ("toyworld:general?row=5", "did you mean rows?"),
        ("toyworld:student?rows=5", "width and layers"),
        ("toyworld:student?width=100", "multiple of 32"),
        ("toyworld:teacher?layers=0", "above zero"),
        ("toyworld:general?rows=0", "above zero"),
        ("toyworld:general?rows=many", "above zero"),
        ("toyworld:general?noise=1.5", "fraction from 0 to 1"),
        ("toyworld:general?noise=nan", "fraction from 0 to 1"),
        ("toyworld:general?lengths=longer", "equal or unequal"),
        ("toyworld:travel", "toyworld:travel?lengths=unequal"),
        ("toyworld:", "no such name"),
        ("general", "no such name"),
        ("toyworld:domain?rows=1000000", "ask for at most"),
    ],
)
def test_a_wrong_name_is_told_what_would_be_right(tmp_path: Path, name: str, told: str) -> None:
    with pytest.raises(InputError) as caught:
        materialise(name, tmp_path)
    assert told in str(caught.value)
    assert name in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_name_is_told_from_a_path() -> None:
    assert is_toyworld("toyworld:general?rows=5")
    assert not is_toyworld("data/toyworld.jsonl")
    assert not is_toyworld(Path("toyworld"))
    assert not is_toyworld(None)


def test_the_world_of_equal_lengths_stays_as_it_is(tmp_path: Path) -> None:
    """Frozen tests, recipes and published figures rest on these bytes."""
    digests = {
        "corpus?rows=200": "dff75556d009b2eb",
        "general?rows=200&noise=0.3": "ece509344229e9f1",
        "domain?rows=200": "d5a540c55e5f1bce",
    }
    for name, digest in digests.items():
        made = materialise(f"toyworld:{name}", tmp_path, seed=3).read_bytes()
        assert hashlib.sha256(made).hexdigest()[:16] == digest, name
        same = materialise(f"toyworld:{name}&lengths=equal", tmp_path, seed=3)
        assert same.read_bytes() == made


@pytest.mark.parametrize(
    ("name", "least", "most"), [("corpus", 5, 60), ("domain", 2, 4), ("travel", 2, 4)]
)
def test_unequal_lengths_are_within_their_bounds(
    tmp_path: Path, name: str, least: int, most: int
) -> None:
    path = materialise(f"toyworld:{name}?lengths=unequal&rows=1500", tmp_path)
    found = [len(answer.split()) + 1 for answer in answers(path)]  # and the end of the turn
    assert least == min(found)
    assert most - 5 <= max(found) <= most
    whole = [len(f"{p} {a}".split()) + 5 for p, a in zip(prompts(path), answers(path), strict=True)]
    assert max(whole) <= 96, "with roles, ends of turns and the beginning"
    words = {word for text in (*prompts(path), *answers(path)) for word in text.split(" ")}
    assert words <= set(WORDS)


def test_noise_and_rows_are_those_of_any_world(tmp_path: Path) -> None:
    short, longer, noisy = (
        materialise(f"toyworld:general?lengths=unequal&{options}", tmp_path)
        for options in ("rows=100", "rows=300", "rows=300&noise=0.3")
    )
    assert rows(longer)[:100] == rows(short)
    assert prompts(longer) == prompts(noisy)
    wrong = sum(a != b for a, b in zip(answers(longer), answers(noisy), strict=True))
    assert wrong == pytest.approx(90, abs=30)
