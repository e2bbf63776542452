"""What clients send, checked: the bodies of OpenAI's completions and chat completions, and errors in its form."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from fp8.runtime.sampling_params import RequestError, SamplingParams

MAX_CHOICES = 128  # prompts times n
MAX_STOPS = 64  # stop strings: every one is looked for in the text of every step
# Fields that are not served, with the values that mean nothing was asked for: others are refused.
NEUTRAL: dict[str, Any] = {
    "prompt_logprobs": None, "best_of": 1, "use_beam_search": False, "beam_width": 1, "suffix": "", "tools": [],
    "tool_choice": "none", "functions": [], "parallel_tool_calls": True, "response_format": {"type": "text"},
    "modalities": ["text"], "store": False, "service_tier": "auto",
}  # fmt: skip
SILENT = {"metadata", "safety_identifier", "prompt_cache_key"}  # for OpenAI's own books: without effect on an answer
SAMPLING = {f.name for f in fields(SamplingParams) if "logprob" not in f.name} - {
    "max_tokens", "n", "beam_width", "length_penalty", "early_stopping",
}  # fmt: skip
SERVED = {"model", "max_tokens", "stream", "stream_options", "user", "priority", "n", "echo", "logprobs"}
OF_CHATS, OF_COMPLETIONS = {"messages", "max_completion_tokens", "top_logprobs"}, {"prompt"}
NUMBERS = {"temperature", "top_p", "min_p", "typical_p", "presence_penalty", "frequency_penalty", "repetition_penalty"}


Output = tuple[str, dict[str, Any] | None]  # a choice's text and its field `logprobs`


class ClientError(Exception):
    """A request that is answered with an error: `status`, and the body in OpenAI's form."""

    def __init__(
        self, status: int, message: str, kind: str = "invalid_request_error", param: str | None = None,
        code: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class Order:
    """A checked body. `prompts` are texts or token ids; a chat has `messages` instead."""

    model: str
    prompts: list[str | list[int]]
    messages: list[dict[str, Any]] | None
    params: SamplingParams
    n: int
    stream: bool
    include_usage: bool
    priority: int
    user: str
    echo: bool = False

    @property
    def chat(self) -> bool:
        return self.messages is not None


def parse_order(body: bytes, model: str, chat: bool) -> Order:
    """Raises ClientError (4xx) for whatever is wrong, naming the field."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ClientError(400, f"the body is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ClientError(400, "the body must be a JSON object")
    if _field(data, "model", str, model) != model:
        raise ClientError(404, f"the model {data['model']!r} does not exist; this server has {model!r}", param="model",
                          code="model_not_found")  # fmt: skip
    _refuse_unknown(data, chat)
    prompts = [] if chat else _prompts(data)
    n = _field(data, "n", int, 1)
    if not 1 <= n * max(1, len(prompts)) <= MAX_CHOICES:
        raise ClientError(400, f"n is {n}; prompts times n must lie between 1 and {MAX_CHOICES}", param="n")
    stream = _field(data, "stream", bool, False)
    echo = _field(data, "echo", bool, False)
    if echo and chat:
        raise ClientError(400, "echo is true; a chat has no prompt to echo: leave it out", param="echo")
    return Order(
        model, prompts, _messages(data) if chat else None, _params(data, chat), n, stream,
        _include_usage(data, stream), _field(data, "priority", int, 0), _field(data, "user", str, ""),
        echo,
    )  # fmt: skip


def _refuse_unknown(data: dict[str, Any], chat: bool) -> None:
    """A field that would be passed over in silence may be one that the client counts on."""
    known = SERVED | SAMPLING | SILENT | NEUTRAL.keys() | (OF_CHATS if chat else OF_COMPLETIONS)
    for name in sorted(data.keys() - known):
        kind = "chat completions" if chat else "completions"
        raise ClientError(400, f"{_short(name)} is no field of {kind} here; leave it out", param=name[:60])
    text = json.dumps(data, ensure_ascii=False)
    if not _encodable(text):
        raise ClientError(400, "the body holds half a surrogate pair, which is no character")


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _include_usage(data: dict[str, Any], stream: bool) -> bool:
    options = _field(data, "stream_options", dict, {})
    if options and not stream:
        raise ClientError(400, "stream_options is given, and stream is not true", param="stream_options")
    for name in options.keys() - {"include_usage", "include_obfuscation"}:
        raise ClientError(400, f"stream_options.{_short(name)} is not supported", param="stream_options")
    if options.get("include_obfuscation"):
        raise ClientError(400, "stream_options.include_obfuscation is not supported", param="stream_options")
    return bool(_field(options, "include_usage", bool, False))


def _field(data: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    """A field of one type, `default` where it is absent or null; a bool is no int."""
    value = data.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ClientError(400, f"{name} is {_short(value)}; it must be of type {kind.__name__}", param=name)
    return value


def _prompts(data: dict[str, Any]) -> list[str | list[int]]:
    prompt = data.get("prompt")
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and _token_ids(prompt):
        return [prompt]
    if isinstance(prompt, list) and prompt and all(isinstance(p, str) or _token_ids(p) for p in prompt):
        return prompt
    raise ClientError(400, "prompt must be a text, a list of texts, token ids, or a list of lists of token ids, "
                      "none of them empty", param="prompt")  # fmt: skip


def _token_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(t) is int and abs(t) < 2**31 for t in value)


def _messages(data: dict[str, Any]) -> list[dict[str, Any]]:
    messages = _field(data, "messages", list, [])
    if not messages:
        raise ClientError(400, "messages is missing or empty; give at least one", param="messages")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ClientError(400, f'{where} must be an object with "role" and "content"', param=where)
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ClientError(400, f"{where}.content must be a text", param=where)
    return {**message, "content": content}


def _params(data: dict[str, Any], chat: bool) -> SamplingParams:
    for name, neutral in NEUTRAL.items():
        value = data.get(name)
        if value is not None and (value != neutral or type(value) is not type(neutral)):  # 0 is not False here
            raise ClientError(400, f"{name} is {_short(value)}; this server does not support it", param=name)
    limit = _field(data, "max_completion_tokens", int, None) if chat else None
    limit = _field(data, "max_tokens", int, 2**31 if chat else 16) if limit is None else limit
    values: dict[str, Any] = {"temperature": 1.0, "logprobs": _logprobs(data, chat)}
    if data.get("echo"):
        values["prompt_logprobs"] = values["logprobs"]
    for name in SAMPLING & data.keys():
        if data[name] is not None:
            values[name] = _sampling_value(name, data[name])
    try:
        return SamplingParams(max_tokens=limit, **values)
    except RequestError as error:
        raise ClientError(400, str(error)) from error
    except (TypeError, ValueError, OverflowError) as error:
        raise ClientError(400, f"a sampling value is of the wrong type: {error}") from error


def _logprobs(data: dict[str, Any], chat: bool) -> int | None:
    """How many likeliest tokens are wanted beside each one, None for no log-probabilities."""
    if not chat:
        return _field(data, "logprobs", int, None)
    wanted, top = _field(data, "logprobs", bool, False), _field(data, "top_logprobs", int, None)
    if top is not None and not wanted:
        raise ClientError(400, f"top_logprobs is {top}; it needs logprobs to be true", param="top_logprobs")
    return (top or 0) if wanted else None


def _sampling_value(name: str, value: Any) -> Any:
    if name in NUMBERS and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise ClientError(400, f"{name} is {_short(value)}; it must be a number", param=name)
    if name in ("seed", "min_tokens", "top_k") and type(value) is not int:
        raise ClientError(400, f"{name} is {_short(value)}; it must be a whole number", param=name)
    if name == "stop_token_ids" and not (isinstance(value, list) and all(type(t) is int for t in value)):
        raise ClientError(400, f"{name} is {_short(value)}; it must be a list of token ids", param=name)
    if name == "ignore_eos" and not isinstance(value, bool):
        raise ClientError(400, f"{name} is {_short(value)}; it must be true or false", param=name)
    if name == "logit_bias":
        return _logit_bias(value)
    if name == "stop" and isinstance(value, str):
        return (value,)
    if name == "stop" and isinstance(value, list) and len(value) > MAX_STOPS:
        raise ClientError(400, f"stop holds {len(value)} texts; {MAX_STOPS} are the most", param="stop")
    return tuple(value) if isinstance(value, list) else value


def _logit_bias(value: Any) -> dict[int, float]:
    try:
        return {int(token): bias for token, bias in value.items()}  # JSON has no keys but texts
    except (AttributeError, ValueError) as error:
        raise ClientError(
            400, f"logit_bias is {_short(value)}; it must map token ids to numbers", param="logit_bias"
        ) from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


class Answer:
    """Bodies of the answer to one order."""

    def __init__(self, order: Order) -> None:
        self._order = order
        kind = "chat.completion" if order.chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if order.chat else 'cmpl'}-{secrets.token_hex(12)}", "created": int(time.time()),
            "model": order.model,
        }  # fmt: skip
        self._kind, self._chunk_kind = kind, "chat.completion.chunk" if order.chat else kind

    def whole(self, outputs: Sequence[Output], reasons: Sequence[str | None], usage: dict[str, int]) -> dict[str, Any]:
        choices = [
            {"index": i, "logprobs": logprobs, "finish_reason": reason, **self._content(text, "message")}
            for i, ((text, logprobs), reason) in enumerate(zip(outputs, reasons, strict=True))
        ]
        return {**self._head, "object": self._kind, "choices": choices, "usage": usage}

    def chunk(self, index: int, output: Output, reason: str | None, first: bool) -> dict[str, Any]:
        text, logprobs = output
        content = self._content(text, "delta")
        if self._order.chat and not first:
            del content["delta"]["role"]
        choice = {"index": index, "logprobs": logprobs, "finish_reason": reason, **content}
        later = {"usage": None} if self._order.include_usage else {}  # as OpenAI's: the last event has it
        return {**self._head, "object": self._chunk_kind, "choices": [choice], **later}

    def last_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        return {**self._head, "object": self._chunk_kind, "choices": [], "usage": usage}

    def _content(self, text: str, key: str) -> dict[str, Any]:
        return {key: {"role": "assistant", "content": text}} if self._order.chat else {"text": text}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}
