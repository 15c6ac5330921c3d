"""A server that generates with adapters which it loads while it runs, as vLLM does."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import torch
from fault_server import Answer, Asked
from peft import PeftModel
from transformers import AutoModelForCausalLM


class LoraServer:
    """Holds a base model; takes the most probable token each time.

    Args:
        base: folder of the model under the adapters.
    """

    def __init__(self, base: Path) -> None:
        self.base, self.model = base, "org/student"
        self.loaded: dict[str, Any] = {}
        self.names: list[str] = []  # of every adapter, in the order in which they came
        self.generated = 0
        self._lock = threading.Lock()

    def __call__(self, asked: Asked) -> Answer:
        """Answer a request."""
        with self._lock, torch.no_grad():
            if asked.path == "/v1/models":
                return Answer(body=json.dumps({"data": [{"id": self.model}]}))
            if asked.path == "/v1/load_lora_adapter":
                return self._load(asked.body["lora_name"], asked.body["lora_path"])
            if asked.path == "/v1/unload_lora_adapter":
                found = self.loaded.pop(asked.body["lora_name"], None)
                return Answer(200 if found else 404, "unloaded")
            name = asked.body["model"]
            if name not in self.loaded:
                return Answer(404, json.dumps({"error": {"message": "no such model"}}))
            return Answer(body=json.dumps(self.reply(self.loaded[name], asked.body)))

    def _load(self, name: str, path: str) -> Answer:
        if name in self.loaded:
            return Answer(400, json.dumps({"error": {"message": f"{name} is already loaded"}}))
        base = AutoModelForCausalLM.from_pretrained(self.base)
        self.loaded[name] = PeftModel.from_pretrained(base, path).eval()
        self.names.append(name)
        return Answer(body=f"Success: LoRA adapter '{name}' added successfully.")

    def reply(self, model: Any, body: dict[str, Any]) -> dict[str, Any]:
        """The completion of a prompt."""
        ids, new, said, reason = list(body["prompt"]), [], [], "length"
        while len(new) < body["max_tokens"] and reason == "length":
            log_p = model(input_ids=torch.tensor([ids + new])).logits[0, -1].log_softmax(-1)
            new.append(int(log_p.argmax()))
            said.append(float(log_p[new[-1]]))
            if new[-1] in body["stop_token_ids"]:
                reason = "stop"
        self.generated += 1
        choice = {
            "text": "x",
            "token_ids": new,
            "prompt_token_ids": ids,
            "finish_reason": reason,
            "logprobs": {"token_logprobs": said},
        }
        return {"model": body["model"], "choices": [choice]}
