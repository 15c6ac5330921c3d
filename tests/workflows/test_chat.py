"""A chat is held with any generator; the command itself is tested in bad_input."""

from __future__ import annotations

from fault_server import reply, serve

from dominie.generation.calls import Calls
from dominie.generation.endpoint import Endpoint
from dominie.generation.generator import EndpointGenerator, Sampling
from dominie.generation.reply_log import ReplyLog
from dominie.workflows.chat import ChatModel, ChatSession

__all__ = ["serve"]


def test_a_chat_with_a_model_behind_an_endpoint(serve, tmp_path):
    server = serve(lambda asked: reply(f" {len(asked.body['messages'])}", finish_reason="length"))
    endpoint = Endpoint(endpoint=server.url, model="m")
    calls = Calls(endpoint, ReplyLog(tmp_path / "l.jsonl"), where="chat", show=print)
    model = ChatModel("m", EndpointGenerator(calls))
    session, pieces = ChatSession(model, Sampling(max_new_tokens=512), "Be brief."), []
    assert session.answer("one?", pieces.append), "an answer that was cut is one"
    assert session.answer("two?", pieces.append)
    assert pieces == ["2", "4"]
    assert [message["content"] for message in session.messages] == [
        "Be brief.", "one?", "2", "two?", "4"
    ]  # fmt: skip
    assert {body["max_tokens"] for body in server.bodies} == {512}
