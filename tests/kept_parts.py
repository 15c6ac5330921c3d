"""Published chat templates × kinds of conversation: is any part left out without a word?

Every text of a conversation is given a word of its own, and transformers renders it. A word that is
not in the rendering must belong to a kind that is named, or to a conversation that is refused.
As a program it prints the table of docs/reliability.md: `python tests/kept_parts.py`.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

from published_templates import CHATS, FOLDER, SETS, template_text, tokenizer_for

from dominie.core.errors import InputError
from dominie.data.conversations import Conversation
from dominie.data.tokenization import encode_and_tell

KINDS = {
    "system": ("system messages",),
    "tool": ("results of tools",),
    "thoughts": ("thoughts", "thoughts of earlier turns, which it keeps in the last turn alone"),
    "words": ("words beside a tool call",),
    "description": ("descriptions of tools", "the tools on offer"),
    "parameter": ("descriptions of parameters of tools", "the tools on offer"),
}
"""What may be left out, and how it is named then; questions, answers and calls are refused."""


def worded(messages: Any, tools: Any) -> tuple[Any, Any, dict[str, str]]:
    """The conversation with a word in each text, and the kind of part by word."""
    messages, tools = copy.deepcopy((messages, tools))
    kinds: dict[str, str] = {}

    def word(kind: str) -> str:
        kinds[f"qw{len(kinds)}x"] = kind
        return list(kinds)[-1]

    for tool in tools or ():
        function = tool["function"]
        function["description"] += " " + word("description")
        for value in function["parameters"]["properties"].values():
            value["description"] += " " + word("parameter")
    for message in messages:
        calls = message.get("tool_calls", ())
        before, mark, spoken = message["content"].rpartition("</think>")
        if mark:
            before = before.rstrip() + " " + word("thoughts") + "\n"
        if spoken.strip():
            kind = "words" if calls else message["role"]
            spoken = spoken.rstrip() + " " + word(kind)
        message["content"] = before + mark + spoken
        if "reasoning_content" in message:
            message["reasoning_content"] += " " + word("thoughts")
        for call in calls:
            call["function"]["arguments"]["note"] = word("call")
    return messages, tools, kinds


def outcomes(name: str, kind: str) -> Iterator[str]:
    """What becomes of each part under a template: `kept`, `named` or `refused`.

    It is `silent` if it is left out without a word, `named falsely` if it is none that is.
    """
    tokenizer = tokenizer_for(name)
    messages, tools, kinds = worded(*CHATS[kind])
    conversation = Conversation(messages, tools, "d.jsonl:1")
    try:
        [(_, left_out)] = encode_and_tell(tokenizer, [conversation])
    except InputError:
        yield from ["refused"] * len(kinds)
        return
    said = {each.what for each in left_out}
    text = template_text(tokenizer, messages, tools)
    lost = {of for word, of in kinds.items() if word not in text}
    for word, of in kinds.items():
        named = bool(said.intersection(KINDS.get(of, ())))
        if word in text:
            yield "kept" if of in lost or not named else "named falsely"
        else:
            yield "named" if named else "silent"


def table(names: list[str]) -> Iterator[str]:
    """The lines of the table, one for each set of templates."""
    head = ("templates of", "templates", "parts", "kept", "named", "refused", "silent")
    yield "| " + " | ".join(head) + " |"
    yield "|---" * len(head) + "|"
    whole: Counter[str] = Counter()
    for prefix, title in SETS.items():
        of_it = [name for name in names if name.startswith(f"{prefix}--")]
        found = Counter(each for name in of_it for kind in CHATS for each in outcomes(name, kind))
        whole += found
        yield _line(title, len(of_it), found)
    yield _line("all", len(names), whole)


def _line(title: str, templates: int, found: Counter[str]) -> str:
    counts = [found[each] for each in ("kept", "named", "refused", "silent")]
    cells = [title, templates, sum(found.values()), *counts]
    return "| " + " | ".join(f"{c:,}" if isinstance(c, int) else c for c in cells) + " |"


if __name__ == "__main__":
    print(*table(sorted(path.stem for path in FOLDER.glob("*.jinja"))), sep="\n")
