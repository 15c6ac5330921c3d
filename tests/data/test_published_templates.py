"""The mask under published templates is that of a reference, which knows the families' markers.

The templates are no part of this project: a folder beside the repository has them, or none.
"""

import pytest
from published_templates import CHATS, FOLDER, outcome, sweep, tokenizer_for
from template_markers import family_of, reference_turns

NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
SAMPLE = [
    "axo--command_a_tool_use",
    "axo--gemma4",
    "ikl--Apertus-8B-Instruct",
    "ikl--openai-gpt-oss-120b",
    "ikl--unsloth-Apriel-1.5",
    "mrs--nousresearch_hermes3_tool_use",
    "trl--glm4moe",
    "trl--phi3",
]
needs_templates = pytest.mark.skipif(
    not NAMES, reason=f"no templates in {FOLDER}; set DOMINIE_TEMPLATES to a folder of them"
)


def wrong(results):
    return {pair: why for pair, (verdict, why) in results.items() if verdict == "wrong"}


@needs_templates
@pytest.mark.parametrize("name", SAMPLE)
def test_nothing_wrong_is_learnt(name):
    if name not in NAMES:
        pytest.skip(f"no {name} in {FOLDER}")
    tokenizer, family = tokenizer_for(name), family_of(name)
    results = {kind: outcome(tokenizer, family, kind) for kind in CHATS}
    assert not wrong(results)
    assert sum(verdict == "right" for verdict, _ in results.values()) > 10


@pytest.mark.full
@pytest.mark.timeout(900)
@needs_templates
def test_nothing_wrong_is_learnt_under_any_of_them():
    results = sweep(NAMES)
    assert not wrong(results)
    assert sum(verdict == "right" for verdict, _ in results.values()) > 0.7 * len(results)


def test_the_reference_reads_markers():
    text = "<|user|>Alpha?<|assistant|>Beta.<|user|>Gamma?<|assistant|>Delta."
    whole, spans = reference_turns(family_of("GLM-4"), text, 0)
    assert whole == text + "<|user|>"
    assert [whole[slice(*span)] for span in spans] == ["Beta.<|user|>", "Delta.<|user|>"]
