"""Published chat templates × kinds of conversation, against the markers of each family.

As a program it prints the table of docs/reliability.md: `python tests/published_templates.py`.
The templates are data beside the repository, or where DOMINIE_TEMPLATES says; none is in it.
"""

from __future__ import annotations

import copy
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from template_markers import Family, family_of, reference_turns
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dominie.core.errors import InputError
from dominie.data import supervised_spans

FOLDER = Path(
    os.environ.get(
        "DOMINIE_TEMPLATES",
        Path(__file__).parents[2] / "shared" / "data" / "chat_templates",
    )
)
MARKER = re.compile(
    r"<\|[^\s<>|]+\|>|<｜[^\s<>]+?｜>|<\|[\w\"]+\|?>|<\w+\|>|\[\|\w+\|\]|</?seed:[a-z_]+>"
    r"|</?(?:think|tool_call|tool_response|s|arg_key|arg_value)>|<(?:sop|sep|end_of_utterance)>"
    r"|<(?:start|end)_of_turn>|\[/?(?:INST|TOOL_CALLS|TOOL_RESULTS|AVAILABLE_TOOLS|gMASK)\]"
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "its name"}},
                "required": ["city"],
            },
        },
    }
]


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def bot(content: str, *calls: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": content,
        **({"tool_calls": [*calls]} if calls else {}),
    } | more


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def call(number: int = 1, **arguments: Any) -> dict[str, Any]:
    function = {"name": "weather", "arguments": arguments or {"city": f"Oslo{number}"}}
    return {"id": f"call{number:05}", "type": "function", "function": function}


def result(content: str, number: int = 1) -> dict[str, Any]:
    return {
        "role": "tool",
        "name": "weather",
        "tool_call_id": f"call{number:05}",
        "content": content,
    }


THOUGHT = "<think>\nHm, well.\n</think>\n\n"
ASKED = [user("Warm in Oslo?"), bot("", call()), result("3 degrees")]
TWO = [user("Alpha?"), bot("Beta."), user("Gamma?"), bot("Delta.")]
CHATS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None]] = {
    "one turn": (TWO[:2], None),
    "two turns": (TWO, None),
    "three turns": ([*TWO, user("Epsilon?"), bot("Zeta.")], None),
    "system": ([system("Be brief."), *TWO[:2]], None),
    "system, two turns": ([system("Be brief."), *TWO], None),
    "system in the middle": ([*TWO[:2], system("Be brief."), *TWO[2:]], None),
    "tools not used": (TWO, TOOLS),
    "call and result": ([*ASKED, bot("It is cold.")], TOOLS),
    "call, result, question": ([*ASKED, bot("It is cold."), *TWO[2:]], TOOLS),
    "system, call and result": ([system("Be brief."), *ASKED, bot("It is cold.")], TOOLS),
    "two calls one after the other": (
        [*ASKED, bot("", call(2)), result("19 degrees", 2), bot("3 and 19.")],
        TOOLS,
    ),
    "parallel calls": (
        [
            user("Oslo and Rome?"),
            bot("", call(), call(2)),
            result("3 degrees"),
            result("19 degrees", 2),
            bot("3 and 19."),
        ],
        TOOLS,
    ),
    "words beside a call": (
        [user("Warm in Oslo?"), bot("Let me look.", call()), *ASKED[2:], bot("It is cold.")],
        TOOLS,
    ),
    "call with numbers": (
        [user("Warm?"), bot("", call(1, day=7, exact=True)), *ASKED[2:], bot("It is cold.")],
        TOOLS,
    ),
    "ends with a call": (ASKED[:2], TOOLS),
    "ends with a result": (ASKED, TOOLS),
    "ends with a question": (TWO[:3], None),
    "reasoning_content": ([user("Alpha?"), bot("Beta.", reasoning_content="Hm, well.")], None),
    "reasoning_content, two turns": (
        [
            user("Alpha?"),
            bot("Beta.", reasoning_content="Hm, well."),
            user("Gamma?"),
            bot("Delta.", reasoning_content="So, so."),
        ],
        None,
    ),
    "reasoning_content before a call": (
        [
            user("Warm in Oslo?"),
            bot("", call(), reasoning_content="Hm, well."),
            result("3 degrees"),
            bot("It is cold.", reasoning_content="So, so."),
        ],
        TOOLS,
    ),
    "thoughts inline": ([user("Alpha?"), bot(f"{THOUGHT}Beta.")], None),
    "thoughts inline, two turns": (
        [user("Alpha?"), bot(f"{THOUGHT}Beta."), user("Gamma?"), bot(f"{THOUGHT}Delta.")],
        None,
    ),
    "empty answer": ([user("Alpha?"), bot(""), user("Gamma?"), bot("Delta.")], None),
    "assistant first": ([bot("Hello!"), *TWO], None),
    "two answers in a row": ([*TWO[:2], bot("And more."), *TWO[2:]], None),
    "two questions in a row": ([user("Alpha?"), user("Now?"), bot("Beta."), *TWO[2:]], None),
    "unicode": ([user("Größe? 你好"), bot("🙂 e\u0301 привет"), user("😀"), bot("😀 你")], None),
    "white space around": ([user("  a \n"), bot("\n one \t\n"), user("\nb"), bot("  x  ")], None),
    "repeats itself": ([user("a"), bot("a"), user("a"), bot("a")], None),
    "lists and code": (
        [user("Show."), bot('```json\n[{"a": 1}]\n```\n\n- one\n- two'), *TWO[2:]],
        None,
    ),
    "weights": ([user("Alpha?"), bot("Beta.", weight=0), user("Gamma?"), bot("Delta.")], None),
}


def byte_tokenizer(markers: Iterable[str], *, bos: str, eos: str) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, with every marker as a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE(vocab={c: n for n, c in enumerate(alphabet)}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, bos_token=bos, eos_token=eos)
    tokenizer.add_tokens(sorted({bos, eos, *markers}), special_tokens=True)
    return tokenizer


def tokenizer_for(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer with a template of the folder, and the markers in it as tokens."""
    source, family = (FOLDER / f"{name}.jinja").read_text(), family_of(name)
    tokenizer = byte_tokenizer(MARKER.findall(source), bos=family.bos, eos=family.eos)
    tokenizer.chat_template = source
    return tokenizer


def outcome(tokenizer: PreTrainedTokenizerFast, family: Family, kind: str) -> tuple[str, str]:
    """`right`, `refused` or `wrong`, and the reason."""
    messages, tools = CHATS[kind]
    try:
        text, spans = supervised_spans(tokenizer, messages, tools)
    except InputError as error:
        return "refused", f"{error.what}: {error.found}"
    places = [text.find(message["content"].strip() or "\0") for message in messages]
    first = min((at for at in places if at >= 0), default=0)
    if messages[0]["role"] == "assistant":
        first = 0
    rendered = template_text(tokenizer, messages, tools)
    whole, expected = reference_turns(family, rendered, first)
    if any("weight" in message for message in messages):
        weights = [
            message.get("weight", 1) for message in messages if message["role"] == "assistant"
        ]
        expected = [span for span, weight in zip(expected, weights, strict=True) if weight]
    if whole == text and _inked(text, spans) == _inked(text, expected) and _tidy(text, spans):
        return "right", ""
    shown = [text[slice(*span)] for span in spans], [whole[slice(*span)] for span in expected]
    return "wrong", f"{shown[0]} for {shown[1]} in {text[first:]!r}"


def template_text(
    tokenizer: PreTrainedTokenizerFast,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
) -> str:
    """What the template makes of messages whose arguments are objects or, if it must be, text."""
    try:
        return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False))
    except Exception:
        as_text = copy.deepcopy(messages)
        for message in as_text:
            for each in message.get("tool_calls", ()):
                each["function"]["arguments"] = json.dumps(each["function"]["arguments"])
        return str(tokenizer.apply_chat_template(as_text, tools=tools, tokenize=False))


def _inked(text: str, spans: list[tuple[int, int]]) -> set[int]:
    """The characters of spans that are no white space."""
    return {at for start, end in spans for at in range(start, end) if not text[at].isspace()}


def _tidy(text: str, spans: list[tuple[int, int]]) -> bool:
    """Whether no white space follows a token that ends a turn."""
    return not any(re.search(r"[>\]]\s+\Z", text[start:end]) for start, end in spans)


def sweep(names: list[str]) -> dict[tuple[str, str], tuple[str, str]]:
    """What becomes of every kind of conversation under every template."""
    found = {}
    for name in names:
        tokenizer, family = tokenizer_for(name), family_of(name)
        found |= {(name, kind): outcome(tokenizer, family, kind) for kind in CHATS}
    return found


SETS = {
    "axo": "axolotl",
    "cz": "chat_templates",
    "ikl": "llama.cpp's, by ik_llama.cpp",
    "mrs": "mistral.rs",
    "trl": "trl",
}
REFUSED = ("the template fails", "it leaves out", "it does not tell")


def row(title: str, results: list[tuple[str, str]], templates: int) -> str:
    """A line of the table."""
    reasons = Counter(why for verdict, why in results if verdict == "refused")
    refused = Counter[str]()
    for why, number in reasons.items():
        fails, leaves = "template fails" in why, "leaves out" in why
        refused[REFUSED[0 if fails else 1 if leaves else 2]] += number
    verdicts = Counter(verdict for verdict, _ in results)
    counts = [templates, len(results), verdicts["right"], *(refused[each] for each in REFUSED)]
    return f"| {title} | " + " | ".join(f"{n:,}" for n in [*counts, verdicts["wrong"]]) + " |"


def table(results: dict[tuple[str, str], tuple[str, str]]) -> Iterator[str]:
    """The lines of the table, one for each set of templates."""
    heads = ["templates of", "templates", "conversations", "right"]
    yield f"| {' | '.join([*heads, *(f'refused: {each}' for each in REFUSED), 'wrong'])} |"
    yield "|---|---|---|---|---|---|---|---|"
    for prefix, title in SETS.items():
        own = {pair: found for pair, found in results.items() if pair[0].startswith(prefix)}
        if own:
            yield row(title, [*own.values()], len({name for name, _ in own}))
    yield row("all", [*results.values()], len({name for name, _ in results}))


if __name__ == "__main__":
    names = sys.argv[1:] or sorted(path.stem for path in FOLDER.glob("*.jinja"))
    results = sweep(names)
    for (name, kind), (verdict, why) in results.items():
        if verdict == "wrong" or len(sys.argv) > 1:
            print(f"{name}, {kind}: {verdict} {why}", file=sys.stderr)
    print(*table(results), sep="\n")
