"""What reads things that others wrote, as functions of bytes: whatever comes, no error but ours.

A target raises where something is wrong: any exception but InputError and RunError.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from transformers import GenerationConfig

from dominie.core.errors import InputError, RunError
from dominie.data import chat_template, trial_process
from dominie.data.chat_template import ChatTemplate
from dominie.data.conversations import read_conversations
from dominie.data.formats import parsed_row
from dominie.data.shards import Entry, Shards, ShardWriter, recover_unfinished
from dominie.data.sources import Source
from dominie.data.tokenization import encode
from dominie.generation.generator import GenerationRequest, Sampling
from dominie.generation.local import LocalGenerator
from dominie.generation.refusals import foreign, status_inside
from dominie.generation.reply_log import Reply, read_reply
from dominie.judge.prompts import disarmed, identifier, letter, ranking, rating
from dominie.models.loading import load_tokenizer
from dominie.models.spec import Model
from dominie.recipe import dump_recipe, load_recipe
from dominie.teachers.cache import Cache, Identity
from dominie.teachers.cache_codec import Coder, Damaged
from dominie.teachers.cache_sampling import CacheSettings, Chosen
from dominie.toyworld.toy_models import word_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny import tiny_model

Target = Callable[[bytes], None]

_PLACE = Path(tempfile.mkdtemp(prefix="fuzz-"))
_TOKENIZER = word_tokenizer()
_TEMPLATE = _TOKENIZER.chat_template
_KEY = bytes(range(16))
_ROW = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "copy red 7"},
        {"role": "assistant", "content": "red 7"},
        {"role": "user", "content": "again"},
        {"role": "assistant", "content": "red"},
    ],
    "family": "colour",
}


def conversations(data: bytes) -> None:
    """The reader, of a file in one of its formats."""
    suffix = (".jsonl", ".json", ".csv")[data[0] % 3 if data else 0]
    path = _PLACE / f"rows{suffix}"
    path.write_bytes(data[1:])
    with contextlib.suppress(InputError, RunError):
        for conversation in read_conversations(Source(name="f", path=str(path))):
            assert any(m["role"] == "assistant" for m in conversation.messages)


def recipe(data: bytes) -> None:
    """A recipe, and what is said of it read back."""
    path = _PLACE / "r.yaml"
    path.write_bytes(data)
    with contextlib.suppress(InputError, RunError):
        found = load_recipe(path)
        path.write_text(dump_recipe(found), encoding="utf-8")
        assert load_recipe(path) == found


def template(data: bytes) -> None:
    """A chat template (up to the first 0) on a row, or the toy world's on any."""
    source, _, row = data.partition(b"\0")
    _TOKENIZER.chat_template = source.decode(errors="replace") or _TEMPLATE
    # The limits of a process that tokenises, in the place of a child process for each template.
    limits = mock.patch.multiple(chat_template, SECONDS=1.0, in_worker=True)
    with limits, contextlib.suppress(InputError, RunError):
        try:
            read = json.loads(row)
        except (ValueError, RecursionError):
            read = _ROW
        encoded = encode(_TOKENIZER, parsed_row(read, "row 1"))
        assert len(encoded.input_ids) == len(encoded.supervised)


def rendering(data: bytes) -> None:
    """A chat template, rendered in the child first: whatever it does, this process goes on."""
    _TOKENIZER.chat_template = data.decode(errors="replace") or _TEMPLATE
    faults = mock.patch.multiple(chat_template, SECONDS=0.3, BYTES=2**28, _faults={})
    with faults, contextlib.suppress(InputError, RunError):
        ChatTemplate(_TOKENIZER).text(_ROW["messages"], None, where="row 1")


def tokenizer(data: bytes) -> None:
    """A tokenizer.json, tried in the child first, then loaded and used here."""
    folder = _PLACE / "tokenizer"
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_bytes(data)
    limits = mock.patch.multiple(trial_process, LOADING_SECONDS=1.0, _tried={})
    with limits, contextlib.suppress(InputError, RunError):
        loaded = load_tokenizer(Model(path=str(folder)))
        assert len(loaded("copy red 7\nà\0")["input_ids"]) < 10_000


def generation(data: bytes) -> None:
    """A generation_config.json: the answer is greedy, or its fields are refused."""
    model, generator = _answering()
    try:  # the loader names whatever is raised here
        model.generation_config = GenerationConfig.from_dict(json.loads(data))
    except Exception:
        return
    request = GenerationRequest(token_ids=[5, 6], stop_ids=(), sampling=Sampling(max_new_tokens=3))
    with contextlib.suppress(InputError, RunError):
        generator.generate([request], lambda _, result: None)


@functools.cache
def _answering() -> tuple[Any, LocalGenerator]:
    model = tiny_model(vocab_size=len(_TOKENIZER)).eval()
    return model, LocalGenerator(lambda: (model, _TOKENIZER))


def verdict(data: bytes) -> None:
    """A reply of a judge about answers that may quote verdicts themselves."""
    text, _, answer = data.decode(errors="replace").partition("\0")
    began = time.process_time()
    foreign(text), status_inside(text)
    for reply in (read_reply(text), Reply(text, cut=len(data) % 7 == 0)):
        if reply is None:
            continue
        quoted = [answer] if answer else []
        found = rating(reply, quoted)
        assert found is None or 1.0 <= found <= 10.0
        assert letter(reply, quoted) in (None, "A", "B", "C")
        for preference in (ranking(reply, quoted), identifier(reply, quoted)):
            assert preference is None or 1.0 <= preference <= 2.0
    assert rating(Reply(disarmed(text)), []) is None
    assert time.process_time() - began < 2.0, "reading takes a time that grows with a square"


def cache(data: bytes) -> None:
    """A row, a shard, what a killed writer left, or a manifest of a teacher cache."""
    kind, rest = (data[0] % 4 if data else 0), data[1:]
    if kind == 0:
        _decode(rest)
        return
    folder = _PLACE / "cache"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with contextlib.suppress(InputError, RunError):
        if kind == 1:
            name = hashlib.blake2b(rest, digest_size=16).hexdigest()
            (folder / f"shard-{name}.arrow").write_bytes(rest)
            _read_all(Shards(folder, remedy="mend it"))
        elif kind == 2:
            (folder / ".writing-0").write_bytes(rest)
            recover_unfinished(folder, is_intact=lambda entry: len(entry.key) == 16)
            _read_all(Shards(folder, remedy="mend it"))
        else:
            (folder / "manifest.json").write_bytes(rest)
            Cache(folder, _IDENTITY, remedy="mend it")


def _decode(data: bytes) -> None:
    """A code whose checksum is right: what somebody who knows the format can write."""
    import zlib

    for bucket in (False, True):
        sealed = zlib.crc32(data, zlib.crc32(_KEY)).to_bytes(4, "little") + data
        with contextlib.suppress(Damaged):
            said = Coder(np.arange(50), 24, bucket).decoded(sealed, _KEY)
            assert len(said.ids) == len(said.token) == len(said.probabilities)


def _read_all(shards: Shards) -> None:
    for columns in shards._columns:
        for index in range(len(columns.keys)):
            entry = shards.get(columns.keys[index].tobytes())
            assert entry is not None


_IDENTITY = Identity(
    teacher="t",
    revision=None,
    weights="0" * 32,
    tokenizer="1" * 32,
    vocabulary=50,
    temperature=1.0,
    scheme=CacheSettings().identity,
)


def _code() -> bytes:
    chosen = Chosen(
        heads=np.array([2, 1, 0]),
        head_ids=np.array([3, 9, 4]),
        head_probabilities=np.array([0.5, 0.25, 0.9]),
        samples=np.array([1, 2, 3]),
        sample_ids=np.array([11, 12, 12, 20, 21, 49]),
        tail=np.array([0.2, 0.05, 0.9]),
        tail_entropy=np.array([1.0, 0.5, 2.0]),
        pooled=np.array([0.05, 0.05, 0.1]),
    )
    return Coder(np.arange(50), 24, False).encoded(chosen, _KEY)


def _shard() -> bytes:
    folder = _PLACE / "seed"
    with ShardWriter(folder) as writer:
        writer.add([Entry(bytes([n]) * 16, n, b"code" * n) for n in range(4)])
        writer.add([Entry(_KEY, 3, _code())])
    return next(folder.glob("shard-*")).read_bytes()


def _manifest() -> bytes:
    import dataclasses

    fields = dataclasses.asdict(_IDENTITY)
    return json.dumps({"format": 1, **fields, "vocabulary_file": f"{'0' * 32}.npy"}).encode()


_LINE = json.dumps(_ROW).encode()
_CALL = json.dumps(
    {
        "messages": [
            {"role": "user", "content": "stock?"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {"function": {"name": "stock", "arguments": '{"id": 7}'}, "type": "function"}
                ],
            },
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": "Three."},
        ],
        "tools": [{"type": "function", "function": {"name": "stock", "parameters": {}}}],
    }
).encode()
_RECIPE = (Path(__file__).parents[1] / "recipes" / "mini.yaml").read_bytes()
_BOMB = b"a0: &a0 [x, x]\n" + b"".join(
    b"a%d: &a%d [*a%d, *a%d]\n" % (n, n, n - 1, n - 1) for n in range(1, 40)
)
_BACKEND = json.loads(_TOKENIZER.backend_tokenizer.to_str())
_REPLACE = {"type": "Replace", "pattern": {"String": "red"}, "content": "red red"}
_STEPS = {"type": "Sequence", "normalizers": [_REPLACE] * 20}
_SHARDS = _shard()

TARGETS: dict[str, Target] = {
    "conversations": conversations,
    "recipe": recipe,
    "template": template,
    "rendering": rendering,
    "tokenizer": tokenizer,
    "generation": generation,
    "verdict": verdict,
    "cache": cache,
}
SEEDS: dict[str, list[bytes]] = {
    "conversations": [
        b"\0" + _LINE + b"\n" + _CALL + b"\n",
        b'\0{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}\n',
        b'\0{"instruction": "add", "input": "1 2", "output": "3"}\n'
        b'{"prompt": "a", "completion": "b"}',
        b"\1[" + _LINE + b", " + _CALL + b"]",
        b'\2instruction,input,output\nadd,"1, 2",3\n',
    ],
    "recipe": [
        _RECIPE,
        b"data: {d: {path: d.jsonl}}\nstages:\n  s: {student: m, data: {d: 1.0}, "
        b"loss: {next_token: 1.0}, train: {lora: {r: 2}, epochs: 2e0, batch: 8}}\n",
        _BOMB,
        b"a: " + b"[" * 2000 + b"]" * 2000,
        b"stages: {a: &a {student: m, data: {d: 1}, loss: {next_token: 1}}, b: *a}\ndata: {d: x}\n",
    ],
    "template": [
        str(_TEMPLATE).encode() + b"\0" + _LINE,
        b"\0" + _CALL,
        b"{% for m in messages %}<{{ m.role }}>{% generation %}{{ m.content }}{% endgeneration %}"
        b"{% endfor %}\0" + _LINE,
        b"{{ messages | tojson }}{% if add_generation_prompt %}>{% endif %}\0" + _LINE,
    ],
    "rendering": [
        str(_TEMPLATE).encode(),
        b"{% set ns = namespace(a=[1]) %}{% for i in range(30) %}{% set ns.a = [ns.a, ns.a] %}"
        b"{% endfor %}{{ ns.a == messages }}{{ messages[0].content }}",
        b"{{ messages | tojson }}{{ strftime_now('%d') }}{{ '%9d' | format(7) }}",
    ],
    "tokenizer": [
        json.dumps(_BACKEND).encode(),
        json.dumps({**_BACKEND, "normalizer": _STEPS}).encode(),
        json.dumps(
            {**_BACKEND, "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}
        ).encode(),
    ],
    "generation": [
        b'{"eos_token_id": 2, "num_beams": 4, "max_time": 1, "temperature": 0.5}',
        b'{"eos_token_id": [2, 3], "bad_words_ids": [[4], [5, 6]], "suppress_tokens": [7]}',
        b'{"repetition_penalty": 1.5, "stop_strings": ["a"], "begin_suppress_tokens": [1]}',
    ],
    "verdict": [
        b"[[" + b" " * 4000,
        b"[{" * 2000,
        b"The first explains more. [[A]]",
        b"Rating: [[7.5]]\0I would say [[10]].",
        b"[{'model': 'model_1', 'rank': 1}, {'model': 'model_2', 'rank': 2}]",
        b'{"choices": [{"message": {"content": "m"}, "finish_reason": "stop", "logprobs": '
        b'{"content": [{"top_logprobs": [{"token": "m", "logprob": -0.1}, '
        b'{"token": "M", "logprob": -2.5}]}]}}], "usage": {"prompt_tokens": 3}}',
    ],
    "cache": [b"\0" + _code()[4:], b"\1" + _SHARDS, b"\2" + _SHARDS[:-40], b"\3" + _manifest()],
}
