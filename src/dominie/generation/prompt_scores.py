"""Log-probabilities of a prompt's own tokens from vLLM and SGLang: asked for, read and tested."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from dominie.core.errors import InputError
from dominie.core.io import mapping
from dominie.generation.endpoint import Engine, ServedModel
from dominie.generation.http_client import Client, Outcome
from dominie.generation.refusals import found_in, refusal
from dominie.generation.reply_log import ScoredReply

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Tokens of the conversation that is scored twice.
TESTED = 256
#: Nats between two calls, on average over its tokens.
MOST_NOISE = 0.02

_NOTHING = -9000.0  # a log-probability below it is none: vLLM writes -9999 for minus infinity
_MOST_OVER = 1e-3  # by which probabilities may exceed 1


class BadScores(ValueError):
    """A reply that holds no log-probabilities of the prompt, or not those that were asked for."""


@dataclass(frozen=True)
class ServerFacts:
    """What a server tells of itself.

    Attributes:
        engine: `vllm` or `sglang`.
        version: of the engine.
        model: the name that requests carry.
        weights: what distinguishes the weights, where the server tells.
        longest: tokens of prompt and reply together, where it tells.
    """

    engine: Engine
    version: str
    model: str
    weights: str | None = None
    longest: int | None = None

    @property
    def compared(self) -> dict[str, str | None]:
        """What has to be the same for all rows of a cache."""
        return {name: asdict(self)[name] for name in ("engine", "version", "model", "weights")}


@dataclass(frozen=True, eq=False)
class PromptScores:
    """The likeliest ids at N positions, each the distribution of the token that stands there.

    Attributes:
        counts: [N] ids of each; at least those asked for, and the token itself.
        ids: [Σ counts] the likeliest first.
        log_probs: [Σ counts] over the whole vocabulary, at temperature 1.
        actual: [N] log-probability of the token itself.
        weights: what distinguishes the server's weights, where a reply tells.
    """

    counts: NDArray[np.int64]
    ids: NDArray[np.int64]
    log_probs: NDArray[np.float64]
    actual: NDArray[np.float64]
    weights: str | None = None


def scores_of(
    reply: ScoredReply,
    engine: Engine,
    ids: Sequence[int],
    positions: Sequence[int],
    *,
    k: int,
    vocabulary: int,
) -> PromptScores:
    """Read the log-probabilities of a prompt at some of its positions.

    Args:
        ids: the prompt.
        positions: of tokens, the first of which is 1: before it nothing stands that predicts it.
        k: how many were asked for.
        vocabulary: ids from here on are padding of the head, and are left out.

    Raises:
        BadScores: log-probabilities are missing, of other tokens, no numbers, or too few.
    """
    entries, weights = (_of_vllm if engine == "vllm" else _of_sglang)(reply.tree, ids)
    counts, flat_ids, flat, actual = [], [], [], []
    least = min(k, vocabulary)
    for j in positions:
        found, token = entries(j), ids[j]
        if token not in found:
            raise BadScores(_echo(entries, ids, j))
        try:
            ranked = sorted(found.items(), key=lambda item: -item[1])
        except TypeError:
            raise BadScores(f"a log-probability at position {j} is no number") from None
        values = [value for _, value in ranked]
        own = found[token]
        if len(values) < least:
            raise BadScores(
                f"{len(values)} ids at position {j} in the place of {least}: vLLM caps them with "
                f"--max-logprobs (20 by default)"
            )
        if ranked[-1][0] == token and own <= _NOTHING and len(values) > least:
            ranked.pop()  # the token itself came beyond the likeliest, and has no probability
            values.pop()
        if any(not value <= 1e-3 or value <= _NOTHING for value in values):
            raise BadScores(f"a log-probability at position {j} is NaN, infinite or above 0")
        if (mass := sum(map(math.exp, values))) > 1 + _MOST_OVER:
            raise BadScores(f"probabilities at position {j} sum to {mass:.4f}")
        kept = [(each, value) for each, value in ranked if each < vocabulary]
        counts.append(len(kept))
        flat_ids += [each for each, _ in kept]
        flat += [min(value, 0.0) for _, value in kept]
        actual.append(max(own, _NOTHING))
    return PromptScores(
        np.array(counts, np.int64),
        np.array(flat_ids, np.int64),
        np.array(flat, np.float64),
        np.array(actual, np.float64),
        weights,
    )


def _of_vllm(tree: Mapping[str, Any], ids: Sequence[int]) -> tuple[Any, str | None]:
    """Reads an entry of `prompt_logprobs`: {id: {logprob, rank, decoded_token}}."""
    try:
        given = tree["choices"][0].get("prompt_logprobs")
    except (LookupError, TypeError, AttributeError):
        given = None
    if not isinstance(given, list):
        raise BadScores("it returns no prompt_logprobs, which is text alone")
    if len(given) != len(ids):
        raise BadScores(f"it scored {len(given)} tokens in the place of {len(ids)}")

    def entry(j: int) -> dict[int, float]:
        try:
            found = {int(name): value["logprob"] for name, value in given[j].items()}
            ranks = {value.get("rank", 1) for value in given[j].values()}
        except (AttributeError, LookupError, TypeError, ValueError):
            raise BadScores(f"there are no log-probabilities at position {j}") from None
        if 1 not in ranks:
            raise BadScores(f"the likeliest id at position {j} is missing")
        return found

    return entry, None


def _of_sglang(tree: Mapping[str, Any], ids: Sequence[int]) -> tuple[Any, str | None]:
    """Reads an entry of `input_top_logprobs`, [[logprob, id, text]], and the token's own."""
    about = mapping(tree.get("meta_info"))
    own, top = about.get("input_token_logprobs"), about.get("input_top_logprobs")
    if not (isinstance(own, list) and isinstance(top, list)):
        raise BadScores("it returns no input_top_logprobs, which is text alone")
    if len(own) != len(ids) or len(top) != len(ids):
        raise BadScores(f"it scored {len(own)} tokens in the place of {len(ids)}")
    told = about.get("weight_version")

    def entry(j: int) -> dict[int, float]:
        try:
            found = {int(each): value for value, each, *_ in top[j]}
            found.setdefault(int(own[j][1]), own[j][0])
        except (LookupError, TypeError, ValueError):
            raise BadScores(f"there are no log-probabilities at position {j}") from None
        return found

    return entry, None if told is None else str(told)


def _echo(entries: Any, ids: Sequence[int], j: int) -> str:
    """Say how the ids of a reply differ from those of the prompt."""
    for shift, way in ((1, "later"), (-1, "earlier")):
        places = [i for i in range(1, len(ids)) if 1 <= i + shift < len(ids)]
        try:
            same = sum(ids[i] in entries(i + shift) for i in places)
        except BadScores:
            continue
        if places and same > 0.9 * len(places):
            return f"log-probabilities come one position {way} than the tokens they are of"
    return f"the token at position {j} is not among the ids there: other tokens were scored"


def server_facts(served: ServedModel, *, where: str) -> ServerFacts:
    """Ask a server which engine and model it is.

    Raises:
        InputError: it cannot be reached, has no such model, or is none that scores prompts.
    """
    with ThreadPoolExecutor(1) as thread:  # a loop may run in this one, as in a notebook
        return thread.submit(asyncio.run, _facts(served, where)).result()


async def _facts(served: ServedModel, where: str) -> ServerFacts:
    key, base = served.key(where=where), served.endpoint.rstrip("/")
    root = base.removesuffix("/v1")
    async with Client(served, key) as client:
        answer = await client.get(f"{base}/models")
        listed = _tree(answer).get("data")
        if answer.refused or answer.status != 200 or not isinstance(listed, list):
            if answer.status != 200:
                raise refusal(served, answer, {}, where=where, has_key=key is not None)
            raise InputError(
                "the endpoint is no server of models",
                where=where,
                expected=f"a list of models from {base}/models",
                found=found_in(answer),
            )
        models = {str(mapping(each).get("id")): mapping(each) for each in listed}
        if served.model not in models:
            raise InputError(
                "no such model on the server",
                where=f"{where}.model",
                expected=f"one of {', '.join(models)}",
                found=served.model,
            )
        version, info, about = [
            _tree(await client.get(f"{root}/{page}"))
            for page in ("version", "server_info", "model_info")
        ]
    mine = models[served.model]
    told = served.engine or mine.get("owned_by")
    engine = told if told in get_args(Engine) else None
    engine = engine or ("vllm" if "version" in version else "sglang" if "version" in info else None)
    if engine is None:
        raise InputError(
            "a teacher's server has to return log-probabilities of prompts",
            where=where,
            expected="vLLM or SGLang",
            found=f"neither by {base}/models, {root}/version nor {root}/server_info",
            do=f"set {where}.engine if it is one of them; else use it as a writer of answers",
        )
    told = about.get("weight_version") if engine == "sglang" else None
    longest = mine.get("max_model_len")
    return ServerFacts(
        engine=engine,
        version=str((version if engine == "vllm" else info).get("version", "unknown")),
        model=served.model,
        weights=None if told is None else str(told),
        longest=longest if type(longest) is int else None,
    )


def _tree(answer: Outcome) -> Mapping[str, Any]:
    """The object in a body; empty if there is none."""
    try:
        return mapping(json.loads(answer.body)) if answer.status == 200 else {}
    except (ValueError, RecursionError):
        return {}


@dataclass(frozen=True)
class Probe:
    """A short conversation and what the server said of it, by which it is recognised.

    Attributes:
        ids: its tokens.
        log_probs: of its tokens from the second on.
        noise: mean difference between two calls, in nats.
    """

    ids: list[int]
    log_probs: list[float]
    noise: float


def self_test(
    first: PromptScores,
    second: PromptScores,
    ids: Sequence[int],
    vocabulary: int,
    *,
    where: str,
) -> tuple[dict[str, Any], Probe]:
    """Judge a server by what it said twice of every token of a conversation but the first.

    Returns:
        Figures in nats and shares, and the conversation as a probe.

    Raises:
        InputError: it is too noisy, or finds the text less likely than chance would have it.
    """
    apart = np.abs(first.actual - second.actual)
    noise, likelihood = float(apart.mean()), float(first.actual.mean())
    tail = 1 - np.exp(first.log_probs).sum() / len(first.counts)
    found: dict[str, Any] = {
        "tokens": len(ids) - 1,
        "noise_mean": round(noise, 6),
        "noise_max": round(float(apart.max()), 6),
        "mean_log_prob": round(likelihood, 4),
        "tail_mass": round(float(tail), 6),
    }
    if noise > MOST_NOISE:
        raise InputError(
            "the server says something else each time it is asked",
            where=where,
            expected=f"a mean difference of at most {MOST_NOISE:g} nats between two calls",
            found=f"{noise:.4f} over {len(ids) - 1} tokens",
            do="start it without quantised caches and speculative decoding, or with fewer "
            "sequences at once",
        )
    least = -math.log(vocabulary) - 1
    if likelihood < least:
        raise InputError(
            "the server finds the conversations less likely than chance would have them: its "
            "tokens are others, or its log-probabilities are off by a position",
            where=where,
            expected=f"a mean log-probability above {least:.1f}",
            found=f"{likelihood:.2f}",
            do="check that tokenizer is that of the model which the server holds",
        )
    log_probs = [round(float(each), 6) for each in first.actual]
    return found, Probe(list(ids), log_probs, noise)
