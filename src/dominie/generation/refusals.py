"""Explains why an endpoint gave no reply, and what to change in the recipe."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dominie.core.errors import InputError
from dominie.core.io import mapping, text
from dominie.data.json_files import whole_characters
from dominie.generation.endpoint import Endpoint
from dominie.generation.http_client import Outcome

_TITLE = re.compile(r"<title[^>]{0,99}>([^<]{1,120})", re.IGNORECASE)
# What a server says of a request that it refuses for its text, and not for who asks or how.
_FILTERED = re.compile(
    r"content.{0,3}(?:filter|management|policy|exists.risk)|responsible.?ai|moderation|\bflagged"
    r"|\b(?:un)?safe|high.risk|data.?inspection|敏感|不安全|违规|usage.(?:guideline|polic)"
    r"|guardrail|prohibited.{0,3}content|sensitive.{0,3}(?:content|words?|information)"
    r"|inappropriate.{0,3}content",
    re.IGNORECASE,
)
_TOO_LONG = re.compile(r"context.{0,3}(?:length|window|size)|too.long|too.many.tokens", re.I)
_STREAM, _ERROR = "a stream of events", "an error"
_ACCESS = re.compile(r"key|token|auth|credential|forbidden|denied|permission|log.?in|sign.?in")
_PATH = re.compile(r"endpoint|method|route|path|url|not.found")
_LENGTH = ("max_tokens", "max_completion_tokens")


def status_inside(body: str) -> int | None:
    """Return the HTTP status of an error that came with status 200, as some gateways send it."""
    for error in _errors(_first_value(body)):
        code = error.get("code", error.get("status"))
        if isinstance(code, str) and code.isdecimal():
            code = int(code)
        if isinstance(code, int) and 400 <= code <= 599:
            return code
    return None


def foreign(body: str) -> str | None:
    """Describe a body that no further attempt makes a chat completion; None if one might."""
    start = body.lstrip("\ufeff \t\r\n")
    if start.startswith("<"):
        title = _TITLE.search(start[:5000])
        return f"a web page, {title[1].strip()!r}" if title else "a web page"
    if _streams(start):
        return _STREAM
    value = _first_value(body)
    if isinstance(value, dict) and "choices" not in value:
        keys = ", ".join(ascii(key)[1:-1][:40] for key in list(value)[:6])
        return _ERROR if any(_errors(value)) else f"an object of {keys or 'nothing'}"
    return None


def costs_nothing(body: str) -> bool:
    """Return whether a body with status 200 is no work of a model: a web page, or an error."""
    return (foreign(body) or "").startswith(("a web page", _ERROR))


def refused_for_its_text(outcome: Outcome, *, replied: bool) -> bool:
    """Return whether the text of a request was refused, which says nothing of other requests.

    Args:
        replied: whether the endpoint answered another request; else all may be too long for it.
    """
    if outcome.status not in (400, 403, 413, 422, 451):
        return False
    pattern = rf"{_FILTERED.pattern}|{_TOO_LONG.pattern}" if replied else _FILTERED.pattern
    return bool(re.search(pattern, _readable(outcome.body), re.IGNORECASE))


def found_in(outcome: Outcome) -> str:
    """Describe an outcome without a reply in a line."""
    flat = " ".join(_readable(outcome.body).split())
    short = flat if len(flat) <= 200 else f"{flat[:200]}…"
    if outcome.status == 0:
        return short
    kind = foreign(outcome.body) if outcome.status == 200 else None
    return f"HTTP {outcome.status}: {f'{kind}: ' if kind else ''}{short}"


def refusal(
    endpoint: Endpoint, outcome: Outcome, sent: Mapping[str, Any], *, where: str, has_key: bool
) -> InputError:
    """Return the error for an outcome that other requests will have, too.

    Args:
        sent: the request.
        where: how messages name the endpoint's place in the recipe.
        has_key: whether the request had a key.
    """
    status, found = outcome.status, found_in(outcome)
    if outcome.refused:
        return InputError(
            "the endpoint cannot be reached",
            where=where,
            found=f"{endpoint.url}: {found}",
            do="name the file of its certificate authority in SSL_CERT_FILE: no other variable, "
            "such as REQUESTS_CA_BUNDLE, is read"
            if "CERTIFICATE_VERIFY_FAILED" in outcome.body
            else "correct that variable, or name the host in NO_PROXY"
            if "(through " in outcome.body
            else "start the server, or correct the URL",
        )
    said = outcome.body.casefold()
    no_credit = status == 403 and re.search(r"\b(?:credits?|billing|balance)\b", said)
    if outcome.unpaid or no_credit:
        return InputError(
            "the endpoint asks for payment",
            where=where,
            found=found,
            do="add credit to the account, then run again: what was answered is kept",
        )
    if status == 200:
        return _no_completion(endpoint, outcome, where=where, found=found)
    about_key = status == 401 or (status == 400 and re.search(r"\bapi[ _-]?key\b", said))
    name = None if about_key else _at_fault(endpoint, outcome.body, sent)
    if name is not None and status not in (404, 405):
        return _parameter_refused(endpoint, name, outcome.body, where=where, found=found)
    about_model = "model" in said
    if status == 407 or (status == 403 and outcome.body.lstrip().startswith("<")):
        return InputError(
            "a proxy or firewall refuses the request",
            where=where,
            found=found,
            do="see the environment variables HTTPS_PROXY and NO_PROXY, and ask who runs it",
        )
    about_access = not said.strip() or _ACCESS.search(said)
    if about_key or (status == 403 and about_access and not about_model):
        return InputError(
            "the endpoint refuses the key" if has_key else "the endpoint asks for a key",
            where=where,
            found=found,
            do=f"check the key in {endpoint.key_env}"
            if endpoint.key_env
            else "name the environment variable that holds it: key_env",
        )
    if status in (404, 405) and not about_model:
        return InputError(
            "the endpoint's URL is not that of chat completions",
            where=where,
            found=f"{endpoint.url}: {found}",
            do=_url_advice(endpoint),
        )
    if 300 <= status < 400:
        return InputError(
            "the endpoint's URL leads to another",
            where=where,
            found=f"{endpoint.url}: {found}",
            do="set endpoint to where it leads, up to /v1, if that is a server you trust",
        )
    if _TOO_LONG.search(said):
        return InputError(
            "the request is longer than the model's context",
            where=where,
            found=found,
            do="lower max_tokens of a judge or max_new_tokens of a benchmark, or serve the model "
            "with a longer context",
        )
    return InputError(
        f"the endpoint refuses requests for model {endpoint.model}",
        where=where,
        found=found,
        do="check model and endpoint (its URL up to /v1)"
        if about_model
        else "do as it says: request: {FIELD: VALUE} sends a field, omit: [FIELD] leaves one out; "
        "else check endpoint (its URL up to /v1) and model",
    )


def no_text(*, where: str, found: Path) -> InputError:
    """Return the error for replies whose tokens all went into thoughts.

    Args:
        found: the log of the replies.
    """
    return InputError(
        "the replies have no text",
        where=where,
        found=f"the first ones, in {found}; a model that thinks needs tokens for both",
        do="raise max_tokens of a judge, max_new_tokens of a benchmark, or have it think less, "
        "request: {reasoning_effort: low}, if the server knows that",
    )


def _no_completion(endpoint: Endpoint, outcome: Outcome, *, where: str, found: str) -> InputError:
    kind, said = foreign(outcome.body), outcome.body.casefold()
    if kind == _ERROR and ("model" in said or not _PATH.search(said)):
        return InputError(
            "the endpoint answers with an error",
            where=where,
            found=found,
            do="do as it says, or run again later; else check model and endpoint",
        )
    return InputError(
        "the endpoint answers with something else than chat completions",
        where=where,
        expected="JSON with choices, from POST …/chat/completions of an OpenAI-compatible server",
        found=f"{endpoint.url}: {found}",
        do="let it answer whole replies: it streams although stream: false was sent"
        if kind == _STREAM
        else _url_advice(endpoint),
    )


def _url_advice(endpoint: Endpoint) -> str:
    if re.search(r"/v\d", endpoint.endpoint):
        return (
            "check endpoint: it is what the server's documentation has before /chat/completions, "
            "/v1 for most, /api/v1 or /api for some"
        )
    return f"try endpoint: {endpoint.endpoint.rstrip('/')}/v1; some servers have /api/v1 or /api"


def _parameter_refused(
    endpoint: Endpoint, name: str, body: str, *, where: str, found: str
) -> InputError:
    if name in endpoint.request:
        do = "change or remove it in request"
    elif name in ("logprobs", "top_logprobs"):
        do = "set logprobs: false; preferences are then not weighed"
    elif name in _LENGTH and "max_completion_tokens" in body and "instead" in body:
        do = "set omit: [max_tokens] and request: {max_completion_tokens: N}"
    elif name in _LENGTH:
        do = "lower it: max_tokens of a judge, max_new_tokens of a benchmark"
    elif name == "temperature":
        do = "set a temperature that it allows, or omit: [temperature]"
    elif name == "stream":
        do = "choose a server or a model that answers without streaming"
    else:
        do = f"set omit: [{name}]"
    return InputError(f"the endpoint refuses {name}", where=where, found=found, do=do)


def _at_fault(endpoint: Endpoint, body: str, sent: Mapping[str, Any]) -> str | None:
    """Return the field of a request that an error names, None if it names none."""
    fields = {_flat(name): name for name in (*sent, "stream") if name not in ("model", "messages")}
    fields |= {_flat(inner): name for name in endpoint.request for inner in _keys(sent.get(name))}
    for error in _errors(_first_value(body)):
        for part in re.split(r"\W+", text(error.get("param")) or ""):
            if _flat(part) in fields:
                return fields[_flat(part)]
    said, places = _flat(body), {}
    for flat, name in fields.items():
        # A short name counts as a word, a long one also within another: responseLogprobs.
        word = re.escape(flat) if len(flat) >= 8 else rf"(?<![^\W_]){re.escape(flat)}(?![^\W_])"
        if found := re.search(word, said):
            places[name] = found.start()
    return min(places, key=lambda name: places[name]) if places else None


def _readable(body: str) -> str:
    """Return JSON with its escaped characters as they are; another text unchanged."""
    if "\\u" not in body:
        return body
    try:
        return str(whole_characters(json.dumps(json.loads(body), ensure_ascii=False)))
    except (ValueError, RecursionError):
        return body


def _keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from _keys(inner)


def _flat(name: str) -> str:
    return name.replace("_", "").casefold()


def _streams(start: str) -> bool:
    """Return whether a text begins as server-sent events or as JSON Lines."""
    if re.match(r"(?:data|event|id|retry)?:[ \w\[{]", start):
        return True
    first, _, rest = start.partition("\n")
    return isinstance(_first_value(first), dict) and isinstance(_first_value(rest), dict)


def _first_value(body: str) -> Any:
    """Return the JSON value at the beginning of a text, None if there is none."""
    try:
        return json.JSONDecoder().raw_decode(body.lstrip("\ufeff \t\r\n"))[0]
    except (ValueError, RecursionError):
        return None


def _errors(value: Any) -> Iterator[dict[str, Any]]:
    """Yield the errors of a response in the shapes that servers give them."""
    if isinstance(value, list) and value:
        value = value[0]
    tree = mapping(value)
    choices = tree.get("choices")
    first = mapping(choices[0]) if isinstance(choices, list) and choices else {}
    for found in (tree.get("error"), first.get("error")):
        if isinstance(found, str) and found:
            yield {"message": found}
        elif isinstance(found, dict):
            yield found
    if tree.get("object") == "error" or ("message" in tree and "code" in tree):
        yield tree
