"""Has a server answer prompts with the adapter of the student that is being trained, as it is."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import shutil
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from dominie.core.distributed import all_gather, broadcast_from_main, rank
from dominie.core.errors import InputError, RunError
from dominie.core.io import mapping
from dominie.generation.calls import Ask, Calls
from dominie.generation.http_client import LARGEST, Client, Outcome
from dominie.generation.refusals import found_in, refusal
from dominie.generation.reply_log import ScoredReply, ScoreLog, call_key, read_scored
from dominie.models.head import causal_lm
from dominie.training.rollouts import Rollout, RolloutKey, RolloutSettings
from dominie.training.student_answers import AskedAnswer, weights_hash

logger = logging.getLogger(__name__)

_WHERE = "rollouts.engine"
Result = TypeVar("Result")


class ServerAnswers:
    """Generates answers on a vLLM server: the base lies there, the adapter is loaded at each step.

    The name of an adapter carries the hash of its weights, every reply has to carry that name, and
    what the server said of the tokens that it drew is compared with what the student says of them
    in the training pass: an answer of older weights does not stay unnoticed.

    Args:
        student: the model that is trained, adapters over a base.
        tokenizer: the student's.
        ends: tokens that end an answer, beside those of the model's generation settings.
        settings: the stage's `rollouts`.
        seed: of the run.
        folder: of the stage's rollouts.

    Raises:
        InputError: no such server or model, or one that takes no adapters.
    """

    def __init__(
        self,
        student: nn.Module,
        tokenizer: Any,
        *,
        ends: Sequence[int],
        settings: RolloutSettings,
        seed: int,
        folder: Path,
    ) -> None:
        assert settings.engine is not None, "answers of a server"
        self.student, self.settings, self.seed = student, settings, seed
        self.server, self._vocabulary = settings.engine, len(tokenizer)
        own = getattr(causal_lm(student).generation_config, "eos_token_id", None)
        own = own if isinstance(own, list) else [] if own is None else [own]
        self._ends = list(dict.fromkeys([*ends, *own]))
        self.stage = folder.parent.name
        self._adapters = Path(self.server.adapters or folder / "adapters").absolute()
        self._key = self.server.key(where=_WHERE)
        self._base = self.server.endpoint.rstrip("/")
        self._loaded: str | None = None
        self._said: dict[RolloutKey, list[float]] = {}
        if rank() == 0:
            _in_thread(self._check_server())
        self._log = ScoreLog(folder / "server.calls.jsonl", on_disk=False)
        self._calls = Calls(
            self.server,
            self._log,
            where=_WHERE,
            show=logger.warning,
            url=f"{self._base}/completions",
            read=read_scored,
            largest=LARGEST,
        )

    def weights_hash(self) -> str:
        """Hash of the weights that are trained."""
        return weights_hash(self.student)

    def write(self, asked: Sequence[AskedAnswer]) -> list[Rollout]:
        """The answers, in the order in which they are asked for. All ranks call it at once.

        Raises:
            InputError: the server does not take the adapter, or refuses what it is asked.
            RunError: it does not answer, or answers as another model.
        """
        name = f"dominie-{self.stage}-{self.weights_hash()}"
        broadcast_from_main(lambda: self._load(name))
        found: dict[int, Rollout] = {}
        self._said = {}

        async def work(index: int, ask: Ask) -> None:
            each = asked[index]
            body = self._body(each, name)
            key = call_key(body)
            reply = await ask(key, body)
            if reply is None:
                raise RunError(
                    "the server does not answer a prompt of the student's",
                    where=_WHERE,
                    found=self._calls.failures[key],
                    do="start it as it was and give the same command again: the stage goes on "
                    "from its last checkpoint",
                )
            assert isinstance(reply, ScoredReply)
            found[index], self._said[each.key] = self._read(reply.tree, each, name)

        # In a thread: signals stay with the training, which ends its step and saves.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(self._calls.run, range(len(asked)), work).result()
        self._log.forget()
        all_gather(None)  # nobody unloads what another still asks
        return [found[index] for index in range(len(asked))]

    def compare(self, key: RolloutKey, losses: Sequence[float]) -> float | None:
        """Nats between what the server said of an answer's tokens and the student's own losses.

        Args:
            key: of the answer.
            losses: −log-probability of each of its tokens, by the student with the same weights.
        """
        said = self._said.get(key)
        if said is None or len(said) != len(losses) or not said:
            return None
        return sum(abs(a + b) for a, b in zip(said, losses, strict=True)) / len(said)

    # The server ------------------------------------------------------------------------------

    async def _check_server(self) -> None:
        async with self._client(f"{self._base}/load_lora_adapter") as client:
            answer = await client.get(f"{self._base}/models")
            listed = _object(answer).get("data")
            if answer.refused or answer.status != 200:
                raise refusal(self.server, answer, {}, where=_WHERE, has_key=self._key is not None)
            if not isinstance(listed, list):
                raise InputError(
                    "the endpoint is no server of models",
                    where=_WHERE,
                    expected=f"a list of models from {self._base}/models",
                    found=found_in(answer),
                )
            names = [str(mapping(each).get("id")) for each in listed]
            if self.server.model not in names:
                raise InputError(
                    "no such model on the server",
                    where=f"{_WHERE}.model",
                    expected=f"one of {', '.join(names)}",
                    found=self.server.model,
                    do="start it with the model that the student's adapter is over",
                )

    def _load(self, name: str) -> None:
        """Write the adapter and have the server load it in the place of the one before."""
        if name == self._loaded:
            return
        model: Any = _with_adapters(self.student)
        folder = self._adapters / name
        try:
            model.save_pretrained(folder, selected_adapters=["default"])
        except OSError as error:
            raise RunError(
                "the student's adapter cannot be written",
                where=str(folder),
                found=error.strerror or str(error),
                do="make room and give the same command again: it goes on from the last checkpoint",
            ) from error
        before, self._loaded = self._loaded, name
        _in_thread(self._exchange(before, name, folder))
        if before is not None:
            shutil.rmtree(self._adapters / before, ignore_errors=True)

    async def _exchange(self, before: str | None, name: str, folder: Path) -> None:
        if before is not None:
            await self._post("unload_lora_adapter", {"lora_name": before})
        load = {"lora_name": name, "lora_path": str(folder)}
        answer = await self._post("load_lora_adapter", load)
        if answer.status == 400 and "already" in answer.body:  # of a run that was interrupted
            await self._post("unload_lora_adapter", {"lora_name": name})
            answer = await self._post("load_lora_adapter", load)
        if answer.status in (200, 201):
            return
        if answer.status in (404, 405):
            raise InputError(
                "the server loads no adapters while it runs",
                where=_WHERE,
                found=found_in(answer),
                do="start vLLM with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, --enable-lora, "
                "--max-loras 2 and --max-lora-rank of the student's train.lora.r",
            )
        if answer.refused or answer.status in (0, 401, 403):
            raise refusal(self.server, answer, load, where=_WHERE, has_key=self._key is not None)
        raise InputError(
            "the server does not take the student's adapter",
            where=_WHERE,
            found=found_in(answer),
            do="start it with --max-lora-rank of the student's train.lora.r, with the model that "
            f"the adapter is over, and where it can read {self._adapters} (or set "
            f"{_WHERE}.adapters to a folder that both see)",
        )

    async def _post(self, page: str, body: dict[str, Any]) -> Outcome:
        async with self._client(f"{self._base}/{page}") as client:
            return await client.send(body, call=f"{page}-{body['lora_name']}")

    def _client(self, url: str) -> Client:
        return Client(self.server, self._key, url=url)

    # Answers ---------------------------------------------------------------------------------

    def _body(self, asked: AskedAnswer, name: str) -> dict[str, Any]:
        """The request for an answer: tokens in, tokens out, and no sampling default of the model's.

        Ends are those of training alone; what the tokens are as text nobody asks.
        """
        fields = {
            "model": name,
            "prompt": list(asked.prompt),
            "max_tokens": asked.room,
            "temperature": self.settings.temperature,
            "top_p": self.settings.top_p,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "seed": asked.key.number(self.seed, "rollout") >> 1,
            "stop_token_ids": self._ends,
            "logprobs": 0,
            "return_token_ids": True,
            **self.server.request,
        }
        return {key: value for key, value in fields.items() if key not in self.server.omit}

    def _read(
        self, tree: Mapping[str, Any], asked: AskedAnswer, name: str
    ) -> tuple[Rollout, list[float]]:
        """The answer in a reply, and the log-probabilities of its tokens."""
        if tree.get("model") != name:
            raise self._other("it answers as another model", name, str(tree.get("model")))
        try:
            choice = tree["choices"][0]
            ids, reason = choice["token_ids"], choice["finish_reason"]
            said = choice["logprobs"]["token_logprobs"]
            prompt = choice.get("prompt_token_ids")
        except (LookupError, TypeError, AttributeError):
            raise self._other(
                "it returns no token ids with their log-probabilities",
                "choices[0].token_ids and logprobs.token_logprobs, as vLLM has them",
                f"an object of {', '.join(map(str, tree))}",
            ) from None
        known = isinstance(ids, list) and isinstance(said, list) and len(ids) == len(said)
        if not known or not all(type(each) is int and 0 <= each < self._vocabulary for each in ids):
            raise self._other("its tokens are not the student's", "ids of the tokenizer", str(ids))
        if prompt is not None and list(prompt) != list(asked.prompt):
            raise self._other("it read another prompt", f"{len(asked.prompt)} ids", f"{prompt}")
        if not all(type(each) in (int, float) and math.isfinite(each) for each in said):
            raise self._other("a log-probability is no number", "finite numbers", str(said))
        ended = reason == "stop"
        if reason not in ("stop", "length") or (ended and (not ids or ids[-1] not in self._ends)):
            raise self._other(
                "an answer ended with no token that ends one",
                "finish_reason length, or stop after an end token",
                f"{reason} after token {ids[-1] if ids else 'none'}",
            )
        return Rollout(asked.key, asked.prompt, ids, ended), [float(each) for each in said]

    def _other(self, what: str, expected: str, found: str) -> RunError:
        return RunError(
            f"the server's answers cannot be used: {what}",
            where=_WHERE,
            expected=expected,
            found=found[:300],
            do="start vLLM as docs/served.md has it, with the model that the adapter is over",
        )


def _with_adapters(student: nn.Module) -> Any:
    """The student as peft has it."""
    from peft import PeftModel

    found = next((each for each in student.modules() if isinstance(each, PeftModel)), None)
    assert found is not None, "checked when the recipe was loaded"
    return found


def _in_thread(work: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine in a thread of its own: a loop may run in this one, as in a notebook."""
    run: Callable[[Coroutine[Any, Any, Result]], Result] = asyncio.run
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(run, work).result()


def _object(answer: Outcome) -> Mapping[str, Any]:
    try:
        return mapping(json.loads(answer.body)) if answer.status == 200 else {}
    except (ValueError, RecursionError):
        return {}
