"""A model of two tokens' reach behind a server that scores prompts, as vLLM and SGLang do."""

from __future__ import annotations

import json
import threading
from typing import Any

import numpy as np
import torch
from fault_server import Answer, Asked


class Scorer:
    """Behaves as a server whose model predicts a token from the one before it.

    Args:
        vocabulary: ids of the tokenizer; the head has three more, which are padding.
        seed: of the weights.
        cap: the most ids that may be asked for, as `--max-logprobs` sets it.
    """

    def __init__(
        self, vocabulary: int, *, engine: str = "vllm", seed: int = 0, cap: int = 64
    ) -> None:
        self.engine, self.cap, self.vocabulary = engine, cap, vocabulary
        self.version, self.model, self.longest = "0.32.0", "org/big", 4096
        self.weight_version = "1"
        self.seed = seed
        self.scored = 0

    @property
    def seed(self) -> int:
        return self._seed

    @seed.setter
    def seed(self, seed: int) -> None:
        self._seed = seed
        size = self.vocabulary + 3
        logits = np.random.default_rng(seed).normal(0, 1, (self.vocabulary, size))
        self.log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))

    def __call__(self, asked: Asked) -> Answer:
        """Answer a request."""
        if not asked.body:
            return self._page(asked.path)
        k = asked.body.get("prompt_logprobs", asked.body.get("top_logprobs_num", 0))
        if k > self.cap:
            said = (
                f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.cap}"
            )
            return Answer(400, json.dumps({"error": {"message": said, "code": 400}}))
        ids = asked.body.get("prompt", asked.body.get("input_ids"))
        tree = self.tree(ids, k)
        self.scored += 1
        return Answer(body=json.dumps(tree))

    def _page(self, path: str) -> Answer:
        pages: dict[str, Any] = {
            "/v1/models": {"data": [{"id": self.model, "max_model_len": self.longest}]},
        }
        if self.engine == "vllm":
            pages["/version"] = {"version": self.version}
        else:
            pages["/server_info"] = {"version": self.version}
            pages["/model_info"] = {"weight_version": self.weight_version}
        return Answer(body=json.dumps(pages[path])) if path in pages else Answer(404, "no")

    def rows(self, ids: list[int]) -> Any:
        """[n - 1, V] log-probabilities of the tokens of a prompt from the second on."""
        return self.log_p[ids[:-1]]

    def tree(self, ids: list[int], k: int) -> dict[str, Any]:
        """The reply as JSON has it."""
        entries: list[list[tuple[int, float, int]] | None] = [None]
        rows = self.rows(ids)
        for log_p, token in zip(rows, ids[1:], strict=True):
            order = np.argsort(-log_p, kind="stable")
            chosen = [int(each) for each in order[:k]]
            if token not in chosen:
                chosen.append(token)
            ranks = {int(each): rank for rank, each in enumerate(order, 1)}
            entries.append([(c, float(log_p[c]), ranks[c]) for c in chosen])
        usage = {"prompt_tokens": len(ids), "completion_tokens": 1}
        if self.engine == "vllm":
            named = [
                each
                and {str(c): {"logprob": p, "rank": r, "decoded_token": "x"} for c, p, r in each}
                for each in entries
            ]
            return {"choices": [{"text": "x", "prompt_logprobs": named}], "usage": usage}
        own = [[None, ids[0], None]] + [
            [float(log_p[b]), b, None] for log_p, b in zip(rows, ids[1:], strict=True)
        ]
        top = [each and [[p, c, None] for c, p, _ in each[:k]] for each in entries]
        about = {"input_token_logprobs": own, "input_top_logprobs": top, **usage}
        return {"text": "x", "meta_info": {**about, "weight_version": self.weight_version}}


class ModelScorer(Scorer):
    """Behaves as a server of a local model."""

    def __init__(self, model: Any, vocabulary: int, **settings: Any) -> None:
        super().__init__(vocabulary, **settings)
        self.of = model
        self._lock = threading.Lock()

    def rows(self, ids: list[int]) -> Any:
        """[n - 1, V] log-probabilities of the model."""
        with self._lock, torch.no_grad():
            logits = self.of(input_ids=torch.tensor([ids])).logits[0, :-1]
            return logits.double().log_softmax(-1).numpy()
