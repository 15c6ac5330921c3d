"""What families of published chat templates write around an answer, as facts for a reference.

Nothing here is computed from a template, and nothing of the product is used: an answer is what
stands between a header of the assistant and the first token that ends a turn of the family.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """How a family writes an answer.

    Attributes:
        names: patterns of the names of its templates.
        header: pattern of what stands before an answer and is given to the model.
        ends: pattern of the token that ends an answer.
        eos: the end-of-sequence token of its tokenizers.
        bos: the first token of a text.
        appended: what ends the last answer though the template does not write it; for a call
            what follows `or`.
        none: pattern of what follows an answer that has no end of its own.
        thoughts: pattern of thoughts in front of an answer that have the same end.
    """

    names: str
    header: str
    ends: str
    eos: str
    bos: str = "<s>"
    appended: str = ""
    none: str = r"(?!)"
    thoughts: str = r"(?!)"


IM = r"<\|im_start\|>assistant\n+"
COHERE = r"<\|START_OF_TURN_TOKEN\|><\|CHATBOT_TOKEN\|>"
DEEPSEEK = r"<｜Assistant｜>"
GEMMA4_END = r"<turn\|>|<\|tool_response>"
FAMILIES = [
    Family(r"(?i)hermes", IM, r"<\|im_end\|>", "<|im_end|>", "<|endoftext|>"),
    Family(r"axo--alpaca|cz--alpaca", r"### Response:\n", "</s>", "</s>"),
    Family(
        r"command_a_", COHERE, r"<\|END_OF_TURN_TOKEN\|>", "<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>"
    ),
    Family(
        r"trl--cohere2",
        COHERE + r"(?:<\|START_RESPONSE\|>)?",
        r"<\|END_OF_TURN_TOKEN\|>",
        "<|END_OF_TURN_TOKEN|>",
        "<BOS_TOKEN>",
    ),
    Family(
        r"cohere|CohereForAI",
        COHERE,
        r"<\|END_OF_TURN_TOKEN\|>",
        "<|END_OF_TURN_TOKEN|>",
        "<BOS_TOKEN>",
        none=r"<\|START_OF_TURN_TOKEN\|>",
    ),
    Family(
        r"DeepSeek-V3\.1",
        DEEPSEEK + r"(?:<think></think>)?|<｜tool▁output▁end｜>(?!<｜tool▁output▁begin｜>)"
        r"|<｜end▁of▁sentence｜>(?=And more)",
        "<｜end▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<｜begin▁of▁sentence｜>",
    ),
    Family(
        r"DeepSeek-V4",
        DEEPSEEK + r"(?:</think>)?",
        "<｜end▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<｜begin▁of▁sentence｜>",
    ),
    Family(
        r"(?i)deepseek",
        DEEPSEEK + r"(?!<｜end▁of▁sentence｜>\s*(?:<｜tool|\Z))(?:<think>\n(?:</think>)?)?"
        r"|<｜tool▁output▁end｜>(?=\n<｜tool▁call▁begin｜>)"
        r"|<｜tool▁outputs▁end｜>(?!<｜Assistant｜>)"
        r"|<｜end▁of▁sentence｜>\s*(?=And more)",
        "<｜end▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<｜begin▁of▁sentence｜>",
        none="<｜User｜>",
    ),
    Family(
        r"axo--exaone4",
        r"\[\|assistant\|\]\n(?:<think>\n\n</think>\n\n)?",
        r"\[\|endofturn\|\]",
        "[|endofturn|]",
        "[BOS]",
    ),
    Family(r"axo--exaone", r"\[\|assistant\|\]", r"\[\|endofturn\|\]", "[|endofturn|]", "[BOS]"),
    Family(
        r"axo--gemma4",
        r"<\|turn>model\n(?:<\|channel>thought\n<channel\|>)?|<tool_response\|>(?!<\|tool_response>)"
        r"|<turn\|>\n(?=And more)",
        GEMMA4_END,
        "<eos>",
        "<bos>",
    ),
    Family(
        r"gemma-4|diffusion_gemma",
        r"<\|turn>model\n(?:<\|channel>thought\n<channel\|>)?",
        GEMMA4_END,
        "<eos>",
        "<bos>",
    ),
    Family(r"gemma", r"<start_of_turn>model\n", "<end_of_turn>", "<eos>", "<bos>"),
    Family(
        r"axo--llama4",
        r"<\|header_start\|>assistant<\|header_end\|>\n\n",
        r"<\|eot\|>|<\|eom\|>",
        "<|eot|>",
        "<|begin_of_text|>",
    ),
    Family(
        r"functionary-medium-v3\.2",
        r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n>>>",
        r"<\|eot_id\|>|<\|eom_id\|>",
        "<|eot_id|>",
        "<|begin_of_text|>",
    ),
    Family(
        r"(?i)llama-?3|functionary|firefunction",
        r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n+",
        r"<\|eot_id\|>|<\|eom_id\|>",
        "<|eot_id|>",
        "<|begin_of_text|>",
    ),
    Family(r"metharme", r"<\|model\|>", r"</s>", "</s>", none=r"<\|(user|model|system)\|>"),
    Family(
        r"(?i)mistral|llama-2",
        r"\[/INST\]|\[/TOOL_RESULTS\](?!\[TOOL_RESULTS\])|</s>(?=And more)",
        "</s>",
        "</s>",
        none=r"\[INST\]",
    ),
    Family(r"(?i)phi[-_]?4", r"<\|im_start\|>assistant<\|im_sep\|>", r"<\|im_end\|>", "<|im_end|>"),
    Family(
        r"(?i)phi|Apriel",
        r"<\|assistant\|>\n|<\|end\|>\n(?=And more)",
        r"<\|end\|>",
        "<|endoftext|>",
        none=r"<\|user\|>",
    ),
    Family(r"amberchat", r"###Assistant:", r"(?!)", "</s>", none=r"\s*###Human:|\s*\Z"),
    Family(r"chatqa", r"\nAssistant:", r"(?!)", "</s>", none=r"\s*\nUser:|\s*\Z"),
    Family(r"openchat", r"GPT4 Correct Assistant:", r"<\|end_of_turn\|>", "<|end_of_turn|>"),
    Family(r"saiga", r"<s>bot\n", "</s>", "</s>"),
    Family(r"solar", r"### Assistant:\n", r"(?!)", "</s>", none=r"\s*### User:|\s*\Z"),
    Family(r"vicuna", r"ASSISTANT:", "</s>", "</s>"),
    Family(r"zephyr", r"<\|assistant\|>\n", "</s>", "</s>"),
    Family(
        r"Apertus",
        r"<\|assistant_start\|>|<\|tools_suffix\|>\[[^\[\]]*\]",
        r"<\|assistant_end\|>|<\|tools_suffix\|>",
        "<|assistant_end|>",
        appended="<|assistant_end|>",
    ),
    Family(r"Seed-OSS", r"<seed:bos>assistant\n", "<seed:eos>", "<seed:eos>", "<seed:bos>"),
    Family(
        r"GLM-4\.7|GLM-5",
        r"<\|assistant\|>(?:<think>)?",
        r"<\|user\|>|<\|observation\|>",
        "<|endoftext|>",
        "[gMASK]",
        appended="<|user|> or <|observation|>",
        none=r"<\|assistant\|>|<\|system\|>",
    ),
    Family(
        r"(?i)glm-?4",
        r"<\|assistant\|>",
        r"<\|user\|>|<\|observation\|>",
        "<|endoftext|>",
        "[gMASK]",
        appended="<|user|> or <|observation|>",
        none=r"<\|assistant\|>|<\|system\|>",
    ),
    Family(r"GigaChat", r"assistant<\|role_sep\|>\n", r"<\|message_sep\|>", "</s>"),
    Family(r"Kimi", r"<\|im_assistant\|>assistant<\|im_middle\|>", r"<\|im_end\|>", "<|im_end|>"),
    Family(r"Reka", r"(?:^|<sep>)assistant:", "<sep>", "<sep>"),
    Family(r"rwkv", r"Assistant:", r"(?!)", "</s>", none=r"\s*\nUser:|\s*\nAssistant:|\s*\Z"),
    Family(
        r"gpt-?oss",
        r"<\|start\|>assistant",
        r"<\|call\|>|<\|return\|>|<\|end\|>",
        "<|return|>",
        "<|startoftext|>",
        thoughts=r"<\|channel\|>analysis.*?<\|end\|><\|start\|>assistant",
    ),
    Family(r"idefics", r"Assistant: ?", r"<end_of_utterance>", "<end_of_utterance>"),
    Family(r"llava", r"\[/INST\]", "</s>", "</s>"),
    Family(r"QwQ", IM + r"(?:<think>\n</think>)?", r"<\|im_end\|>", "<|im_end|>", "<|endoftext|>"),
    Family(
        r"axo--qwen3",
        IM + r"(?:<think>\n+)?",
        r"<\|im_end\|>",
        "<|im_end|>",
        "<|endoftext|>",
    ),
    Family(
        r"qwen3_5_nothink",
        IM + r"(?:<think>\n\n</think>\n\n)?",
        r"<\|im_end\|>",
        "<|im_end|>",
        "<|endoftext|>",
    ),
    Family(
        r"(?i)nemotron_3|qwen3[._](?:5|6)|step-?fun",
        IM + r"(?:<think>\n?)?",
        r"<\|im_end\|>",
        "<|im_end|>",
        "<|endoftext|>",
    ),
    Family(r".", IM, r"<\|im_end\|>", "<|im_end|>", "<|endoftext|>"),
]


def family_of(name: str) -> Family:
    """The family of a template, by its file's name."""
    return next(family for family in FAMILIES if re.search(family.names, name))


def reference_turns(family: Family, text: str, first: int) -> tuple[str, list[tuple[int, int]]]:
    """The text with what ends its last answer, and the answers from character `first` on."""
    end_or_none = re.compile(f"(?P<end>{family.ends})|(?P<none>{family.none})")
    spans, at = [], first
    header = re.compile(family.header)
    while found := header.search(text, at):
        start = found.end()
        thoughts = re.compile(family.thoughts, re.DOTALL).match(text, start)
        end = end_or_none.search(text, thoughts.end() if thoughts else start)
        if end is None:
            if text[start:].strip():
                answer, _, call = family.appended.partition(" or ")
                whole = text + (call if call and text.endswith("</tool_call>") else answer)
                return whole, [*spans, (start, len(whole))]
            break
        stop = end.end() if end["end"] else end.start()
        if text[start:stop].strip():
            spans.append((start, stop))
        at = max(stop - len(end["end"] or ""), found.end())
        if end["end"] and not header.match(text, at):
            at = stop
    return text, spans
