"""Whether a judge and what it judges are relatives: models prefer the style of their own family."""

from __future__ import annotations

import re
from collections.abc import Iterable

_FAMILIES = {
    "OpenAI": r"gpt|chatgpt|davinci|\bo[134]\b",
    "Anthropic": r"claude",
    "Google": r"gemini|gemma|palm|bard",
    "Llama": r"llama|vicuna|alpaca|tulu|guanaco",
    "Mistral": r"mistral|mixtral|zephyr|ministral|magistral",
    "Qwen": r"qwen|qwq",
    "DeepSeek": r"deepseek",
    "Phi": r"\bphi",
    "Cohere": r"command|aya|cohere",
    "GLM": r"glm",
    "Yi": r"\byi\b",
    "Falcon": r"falcon",
    "OLMo": r"olmo",
}


def families(name: str) -> set[str]:
    """The families that the name of a model speaks of."""
    spaced = re.sub(r"[-_/.:]+", " ", name.casefold())
    return {family for family, words in _FAMILIES.items() if re.search(words, spaced)}


def kinship_warning(judge: str, names: Iterable[str]) -> str | None:
    """A sentence where the judge is of the family of a model or of one it learnt from.

    Args:
        judge: name of the judge.
        names: what the model is, started from and was taught by: hub ids, folders, architectures.
    """
    names = list(names)
    if judge in names:
        return f"the judge {judge} judges itself"
    for name in names:
        shared = families(judge) & families(name)
        if shared:
            family = " and ".join(sorted(shared))
            return (
                f"the judge {judge} and {name} are of one family ({family}): "
                "judges favour their own; confirm with a judge of another"
            )
    return None
