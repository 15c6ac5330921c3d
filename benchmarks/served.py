"""A cache filled by a server: positions a second, bytes a token, and time lost to failed calls.

The server is a small one in another process, which has its replies ready and waits before it sends
one as long as a teacher would compute: what is measured is what dominie adds. Its distributions
fall with the rank as those of language models do (p ∝ rank^-1.5 with noise), over 32,000 ids. A
real server is measured with ``--endpoint URL --model NAME --tokenizer PATH``.

    python benchmarks/served.py [--quick] [--json]

``--quick`` scores fewer and shorter conversations; a full run also writes a dated table to
``benchmarks/results``.

``--kl`` measures what a small k costs: held-out KL(teacher ‖ student) on the toy world of students
that learnt from a served teacher's k likeliest tokens and what is left, beside those that learnt
from the whole vocabulary of the same teacher here. Start, rows and order are the same in a seed.
"""

from __future__ import annotations

import json
import multiprocessing
import socket
import statistics
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import _results
import numpy as np
from _results import Row
from rich.console import Console

from dominie.core.display import Display
from dominie.generation.endpoint import ServedModel
from dominie.stages.served_caches import ServedTeacher
from dominie.teachers.cache import Cache, Identity, create
from dominie.teachers.cache_sampling import CacheSettings
from dominie.teachers.cached import key_of_row

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

VOCABULARY = 32_000
THINKS = 0.05  # seconds of a teacher over one conversation
TIMEOUT = 0.5  # ten times a call: a longer one costs its caller more, whatever dominie does
FAULTS = ("429", "500", "time-out", "cut")


def conversations(count: int, length: int) -> list[SimpleNamespace]:
    """Random tokens, the second half of each supervised."""
    rng = np.random.default_rng(0)
    half = np.arange(length) >= length // 2
    return [
        SimpleNamespace(
            input_ids=rng.integers(0, VOCABULARY, length).astype(np.int32), supervised=half
        )
        for _ in range(count)
    ]


def reply(ids: list[int], k: int) -> bytes:
    """What vLLM sends for a prompt: the same each time."""
    rng = np.random.default_rng([k, *ids])
    entries: list[dict[str, Any] | None] = [None]
    ranks = np.arange(1, VOCABULARY + 1)
    weights = ranks**-1.5
    shape = np.log(weights / weights.sum())
    for token in ids[1:]:
        noise = np.sort(rng.normal(0, 0.3, k))[::-1] - 0.3
        chosen = rng.choice(VOCABULARY, k, replace=False)
        entry = {
            str(each): {"logprob": value, "rank": rank, "decoded_token": " word"}
            for rank, (each, value) in enumerate(
                zip(chosen.tolist(), (shape[:k] + np.minimum(noise, 0)).tolist(), strict=True), 1
            )
        }
        entry.setdefault(str(token), {"logprob": -9.0, "rank": k + 9, "decoded_token": " x"})
        entries.append(entry)
    usage = {"prompt_tokens": len(ids), "completion_tokens": 1}
    choice = {"text": " x", "prompt_logprobs": entries}
    return json.dumps({"choices": [choice], "usage": usage}).encode()


def server(sender: Connection, prompts: list[list[int]], ks: list[int]) -> None:
    """Serve until the process is ended; a model named `faulty` fails at one call in twenty."""
    made = dict[tuple[int, bytes], bytes]()
    for k in ks:
        for ids in prompts:
            made[k, np.array(ids, np.int32).tobytes()] = reply(ids, k)
    calls = iter(range(10**9))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

        def send(self, content: bytes, status: int = 200, *, cut: bool = False) -> None:
            self.send_response(status)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if cut else content)
            if cut:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)

        def do_GET(self) -> None:
            models = [{"id": name} for name in ("steady", "faulty")]
            self.send(json.dumps({"data": models, "version": "0"}).encode())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            key = body["prompt_logprobs"], np.array(body["prompt"], np.int32).tobytes()
            number = next(calls) if body["model"] == "faulty" else 0
            kind = FAULTS[number // 20 % len(FAULTS)] if number % 20 == 19 else ""
            try:
                time.sleep(2 * TIMEOUT if kind == "time-out" else THINKS)
                if kind in ("429", "500"):
                    self.send(b"{}", int(kind))
                else:
                    content = made[key] if key in made else reply(body["prompt"], key[0])
                    self.send(content, cut=kind == "cut")
            except OSError:
                self.close_connection = True  # the client has gone

    class Server(ThreadingHTTPServer):
        request_queue_size = 128
        daemon_threads = True

    http = Server(("127.0.0.1", 0), Handler)
    sender.send(http.server_address[1])
    http.serve_forever()


def filled(
    served: ServedModel, rows: list[SimpleNamespace], k: int, tokenizer: Any, folder: Path
) -> tuple[float, Cache]:
    """Fill a cache as `dominie cache` does; seconds without the self-test."""
    settings = CacheSettings(scheme="top", top_p=1.0, k_max=k)
    plan: Any = SimpleNamespace(
        teacher="teacher",
        stage="stage",
        settings=settings,
        rows={key_of_row(row): row for row in rows},
        prepared=SimpleNamespace(tokenizer=tokenizer),
    )
    recipe = SimpleNamespace(served={"teacher": served})
    run: Any = SimpleNamespace(recipe=recipe, path=folder)
    teacher = ServedTeacher(run, plan, Display(Console(file=StringIO())))
    vocabulary, notes = teacher.begin()
    identity = Identity(
        teacher="teacher",
        revision=None,
        weights="",
        tokenizer="",
        vocabulary=len(tokenizer),
        temperature=1.0,
        scheme=settings.identity,
    )
    create(folder / "cache", identity, vocabulary, {}, notes)
    cache = Cache(folder / "cache", identity, remedy="")
    begun = time.perf_counter()
    teacher.write(rows, cache, lambda *_: None)
    seconds = time.perf_counter() - begun
    cache.reread()
    assert len(cache.rows) == len(rows)
    return seconds, cache


def measured(served: ServedModel, rows: list[Any], k: int, tokenizer: Any) -> tuple[float, Cache]:
    """Fill a cache in a folder that is then removed."""
    with tempfile.TemporaryDirectory() as scratch:
        seconds, cache = filled(served, rows, k, tokenizer, Path(scratch))
        _ = cache.rows
        return seconds, cache


def rows(options: Any) -> Iterator[Row]:
    """A row for each k, and one for failed calls beside none."""
    quick = options.quick
    found = conversations(24 if quick else 96, 128 if quick else 512)
    many = conversations(160 if quick else 400, 32)
    ks = [20, 64, 256]
    tokenizer: Any = range(VOCABULARY)
    prompts = [[int(each) for each in row.input_ids] for row in found]
    few = [[int(each) for each in row.input_ids] for row in many]
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.Process(target=_serve, args=(sender, prompts, few, ks), daemon=True)
    process.start()
    url = options.endpoint or f"http://127.0.0.1:{receiver.recv()}/v1"
    settings: dict[str, Any] = {"endpoint": url, "timeout": TIMEOUT, "backoff": 0.05}
    if options.endpoint:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
        settings["timeout"] = 180.0
    name = options.model or "steady"
    try:
        for k in ks:
            served = ServedModel(model=name, engine="vllm", **{**settings, "timeout": 60.0})
            times, cache = [], None
            for _ in range(1 if quick else 3):
                seconds, cache = measured(served, found, k, tokenizer)
                times.append(seconds)
            positions = sum(len(row.input_ids) for row in found)
            assert cache is not None
            yield {
                "what": f"k = {k}",
                "conversations": len(found),
                "positions/s": round(positions / statistics.median(times)),
                "bytes a supervised token": round(cache.rows.code_bytes / cache.rows.tokens, 1),
                "seconds, median": round(statistics.median(times), 2),
            }
        if options.endpoint:
            return
        pairs: dict[str, list[float]] = {"steady": [], "faulty": []}
        for _ in range(1 if quick else 3):
            for model, times in pairs.items():
                served = ServedModel(model=model, engine="vllm", **settings)
                times.append(measured(served, many, 20, tokenizer)[0])
        steady, faulty = (statistics.median(times) for times in pairs.values())
        yield {
            "what": f"1 call in 20 fails ({', '.join(FAULTS)}), k = 20",
            "conversations": len(many),
            "seconds, median": round(faulty, 2),
            "times none failing": round(faulty / steady, 3),
        }
    finally:
        process.kill()


#: Ids that are asked for; the toy world has 242, so that 256 are the whole vocabulary.
KS = (4, 20, 64)

TAUGHT = """
name: taught
data:
  corpus: {path: "toyworld:corpus?rows=6000"}
  general: {path: "toyworld:general?rows=1200", test_fraction: 0.3}
train: {learning_rate: 2e-3, batch: 32, max_length: 32, packing: false, seed: 0}
stages:
  teacher:
    student: "toyworld:teacher"
    data: {corpus: 1.0}
    loss: {next_token: 1.0}
    train: {steps: STEPS}
"""


def model_server(path: Path) -> str:
    """Serve a model's log-probabilities of prompts, in a thread; return its URL."""
    import torch
    from transformers import AutoModelForCausalLM

    model, lock = AutoModelForCausalLM.from_pretrained(path).eval(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

        def answered(self, tree: dict[str, Any]) -> None:
            content = json.dumps(tree).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            self.answered({"data": [{"id": "teacher"}], "version": "0"})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            ids, k = body["prompt"], body["prompt_logprobs"]
            with lock, torch.no_grad():
                log_p = model(input_ids=torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
            top = log_p.topk(k)
            entries: list[dict[str, Any] | None] = [None]
            rows = zip(log_p.tolist(), top.indices.tolist(), top.values.tolist(), strict=True)
            for token, (every, best, values) in zip(ids[1:], rows, strict=True):
                ranked = enumerate(zip(best, values, strict=True), 1)
                entry = {str(i): {"logprob": v, "rank": rank} for rank, (i, v) in ranked}
                entry.setdefault(str(token), {"logprob": every[token], "rank": k + 1})
                entries.append(entry)
            usage = {"prompt_tokens": len(ids), "completion_tokens": 1}
            self.answered({"choices": [{"text": "", "prompt_logprobs": entries}], "usage": usage})

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    threading.Thread(target=http.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{http.server_address[1]}/v1"


def kl_rows(options: Any) -> Iterator[Row]:
    """A row for each k and one for the whole vocabulary, over the seeds."""
    from ruamel.yaml import YAML

    from dominie.recipe import recipe_of
    from dominie.workflows.pipeline import run_recipe

    seeds, steps, first = (2, 20, 40) if options.quick else (3, 100, 200)
    quiet = Display(Console(file=StringIO()))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tree: dict[str, Any] = YAML(typ="safe").load(TAUGHT.replace("STEPS", str(first)))
        made = run_recipe(recipe_of(tree), folder, quiet) / "teacher" / "model"
        url = model_server(made)
        found: dict[str, list[float]] = {}
        for seed in range(seeds):
            served = {"endpoint": url, "model": "teacher", "tokenizer": str(made), "engine": "vllm"}
            tree["name"] = f"students-{seed}"
            tree["models"] = {"big": served, "here": {"path": str(made)}}
            tree["train"] |= {"seed": seed, "steps": steps}
            tree["data"] = {"general": tree["data"]["general"]}
            tree["stages"] = {
                f"k{k}": {
                    "student": "toyworld:student",
                    "teacher": "big" if k else "here",
                    "data": {"general": 1.0},
                    "loss": {"prediction": 1.0},
                    "cache": {
                        "enabled": bool(k),
                        "scheme": "top",
                        "top_p": 1.0,
                        "k_max": k or 1,
                        "folder": str(folder / f"cache-{k}"),
                    },
                }
                for k in (0, *KS)
            }
            tree["evaluate"] = {
                "models": {name: name for name in tree["stages"]},
                "tasks": {"like": {"source": "general", "metric": "agreement", "teacher": "here"}},
            }
            run = run_recipe(recipe_of(tree), folder, quiet)
            results = json.loads((run / "results.json").read_text("utf-8"))
            for name in tree["stages"]:
                found.setdefault(name, []).append(
                    results.get("results", results)[name]["like"]["kl"]
                )
    whole = np.array(found["k0"])
    for name, values in found.items():
        more = np.array(values) - whole
        yield {
            "part": "held-out KL",
            "what": f"k = {name[1:]} and the rest"
            if name != "k0"
            else "the whole vocabulary, here",
            "KL(teacher ‖ student), nats": round(float(np.mean(values)), 4),
            "more than the whole": round(float(more.mean()), 4),
            "± over seeds": round(float(more.std(ddof=1)), 4),
            "seeds": len(values),
        }


def _serve(sender: Any, prompts: list[list[int]], few: list[list[int]], ks: list[int]) -> None:
    server(sender, [*prompts, *few], ks)


def main() -> None:
    """Measure, print, and after a full run write down."""
    parser = _results.parser(__doc__)
    parser.add_argument("--kl", action="store_true", help="held-out KL of students, by k")
    parser.add_argument("--endpoint", help="a real vLLM, up to /v1, in the place of the small one")
    parser.add_argument("--model", help="the name that it has there")
    parser.add_argument("--tokenizer", help="folder or hub id of its tokenizer")
    options = parser.parse_args()
    if bool(options.endpoint) != bool(options.model and options.tokenizer):
        sys.exit("--endpoint, --model and --tokenizer go together")
    found = kl_rows(options) if options.kl else rows(options)
    parts = _results.gathered(found, as_json=options.json)
    title = "Students of a served teacher" if options.kl else "A cache filled by a server"
    _results.finish("served-kl" if options.kl else "served", title, parts, options)


if __name__ == "__main__":
    main()
