"""fp8-serve: OpenAI's interface, its limits and errors; loopback and the ASGI transport only."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import hf_llama
import httpx
import pytest
import tiny_engine

from fp8.runtime.async_llm import AsyncLLM
from fp8.runtime.llm import LLM
from fp8.runtime.request import SamplingParams
from fp8.runtime.server.app import ServerLimits, create_app
from fp8.runtime.server.choice import Choice
from fp8.scripts import serve

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'odd' %}{{ raise_exception('no role odd') }}{% endif %}"
    "{{ m.role }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tiny_engine.write(tmp_path_factory.mktemp("tiny"))
    hf_llama.add_tokenizer(directory)
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE})
    )
    return directory


@contextlib.asynccontextmanager
async def client(
    engine_dir: Path, limits: ServerLimits | None = None, api_key: str | None = None
) -> AsyncIterator[tuple[Any, LLM]]:
    llm = LLM(engine_dir, "cpu")
    app = create_app(AsyncLLM(llm), "tiny", limits, api_key)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", timeout=60) as http,
    ):
        yield http, llm


def post(engine_dir: Path, path: str, body: Any, **options: Any) -> Any:
    async def main() -> Any:
        async with client(engine_dir, **options) as (http, _):
            return await (http.post(path, content=body) if isinstance(body, bytes) else http.post(path, json=body))

    return asyncio.run(main())


def events(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_completions_are_those_of_generate_whole_and_streamed(engine_dir: Path) -> None:
    (expected,) = LLM(engine_dir, "cpu").generate(["AB!"], SamplingParams(max_tokens=12))
    body = {"model": "tiny", "prompt": ["AB!", [33, 34]], "max_tokens": 12, "temperature": 0}

    async def main() -> tuple[Any, Any]:
        async with client(engine_dir) as (http, _):
            stream = {**body, "stream": True, "stream_options": {"include_usage": True}}
            return await asyncio.gather(
                http.post("/v1/completions", json=body), http.post("/v1/completions", json=stream)
            )

    whole, streamed = asyncio.run(main())
    answer = whole.json()
    assert whole.status_code == 200 and answer["object"] == "text_completion"
    assert answer["choices"][0]["text"] == expected.text
    assert [c["finish_reason"] for c in answer["choices"]] == ["length", "length"]
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 24, "total_tokens": 29}
    chunks = events(streamed.text)
    assert chunks.pop()["usage"] == answer["usage"]
    for index in (0, 1):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert "".join(c["text"] for c in mine) == answer["choices"][index]["text"]
        assert [c["finish_reason"] for c in mine if c["finish_reason"]] == ["length"]


FIELDS: list[dict[str, Any]] = [
    {"temperature": 0}, {"temperature": 1.6}, {"seed": 6}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.3},
    {"typical_p": 0.3}, {"repetition_penalty": 1.8}, {"presence_penalty": 2}, {"frequency_penalty": 1.5},
    {"logit_bias": {"40": 25}}, {"stop": ["t", "0"]}, {"stop_token_ids": [54, 3]},
    {"stop_token_ids": [54, 3], "min_tokens": 9}, {"ignore_eos": True},
]  # fmt: skip


def test_every_sampling_field_is_that_of_generate(engine_dir: Path) -> None:
    common = {"max_tokens": 24, "temperature": 5, "seed": 5}
    wanted = [{**common, **field} for field in FIELDS]
    params = [
        SamplingParams(**{**w, "logit_bias": {int(t): b for t, b in w.get("logit_bias", {}).items()}}) for w in wanted
    ]
    llm = LLM(engine_dir, "cpu")
    (plain,) = llm.generate(["user:AB;assistant:"], SamplingParams(**common))
    expected = [llm.generate(["user:AB;assistant:"], p)[0] for p in params]
    assert sum(e.text == plain.text for e in expected) == 1, "each but ignore_eos makes a difference"

    async def main() -> list[Any]:
        async with client(engine_dir) as (http, _):
            texts = [http.post("/v1/completions", json={"prompt": "user:AB;assistant:", **w}) for w in wanted]
            message = {"messages": [{"role": "user", "content": "AB"}]}
            return await asyncio.gather(*texts, *(http.post("/v1/chat/completions", json=message | w) for w in wanted))

    answers = [answer.json()["choices"][0] for answer in asyncio.run(main())]
    for e, text, chat in zip(expected, answers, answers[len(wanted) :], strict=False):
        assert text["text"] == chat["message"]["content"] == e.text
        assert text["finish_reason"] == chat["finish_reason"] == e.finish_reason


def test_a_chat_goes_through_the_template(engine_dir: Path) -> None:
    (expected,) = LLM(engine_dir, "cpu").generate(["user:AB;assistant:"], SamplingParams(max_tokens=8))
    body = {"messages": [{"role": "user", "content": "AB"}], "max_completion_tokens": 8, "temperature": 0}
    answer = post(engine_dir, "/v1/chat/completions", body)
    assert answer.json()["choices"][0]["message"] == {"role": "assistant", "content": expected.text}
    chunks = events(post(engine_dir, "/v1/chat/completions", {**body, "stream": True}).text)
    deltas = [c["choices"][0]["delta"] for c in chunks]
    assert deltas[0]["role"] == "assistant" and "role" not in deltas[-1]
    assert "".join(d["content"] for d in deltas) == expected.text
    refused = post(engine_dir, "/v1/chat/completions", {"messages": [{"role": "odd", "content": "x"}]})
    assert refused.status_code == 400 and "no role odd" in refused.json()["error"]["message"]


def test_models_health_and_metrics(engine_dir: Path) -> None:
    async def main() -> list[Any]:
        async with client(engine_dir) as (http, _):
            await http.post("/v1/completions", json={"prompt": "A", "max_tokens": 3, "temperature": 0})
            return [await http.get(p) for p in ("/v1/models", "/v1/models/tiny", "/v1/models/x", "/health", "/metrics")]

    models, one, unknown, health, metrics = asyncio.run(main())
    assert models.json()["data"][0]["id"] == one.json()["id"] == "tiny"
    assert unknown.status_code == 404 and health.json() == {"status": "ok"}
    lines = dict(line.rsplit(" ", 1) for line in metrics.text.splitlines() if not line.startswith("#"))
    assert lines["fp8_generated_tokens_total"] == "3" and lines['fp8_requests_finished_total{reason="length"}'] == "1"
    assert lines['fp8_request_seconds_bucket{le="+Inf"}'] == lines["fp8_request_seconds_count"] == "1"


def test_bad_input_is_answered_with_4xx_in_openais_form_and_nothing_is_held(engine_dir: Path) -> None:
    long = [1] * 256
    (expected,) = LLM(engine_dir, "cpu").generate(["AB!"], SamplingParams(max_tokens=240, ignore_eos=True))
    cases: list[tuple[str, Any, int, str]] = [
        ("/v1/completions", b"{", 400, "not JSON"),
        ("/v1/completions", b"[" * 100_000, 400, "not JSON"),
        ("/v1/completions", b"[]", 400, "JSON object"),
        ("/v1/completions", {"prompt": "A" * 5000}, 413, "more than 4000 bytes"),
        ("/v1/completions", {"prompt": long}, 400, "max_seq_len is 256"),
        ("/v1/completions", {"prompt": [97]}, 400, "outside the vocabulary"),
        ("/v1/completions", {"prompt": "A é"}, 400, "outside the vocabulary (0 to 96); does the tokenizer belong"),
        ("/v1/completions", {}, 400, "prompt must be"),
        ("/v1/completions", {"prompt": ""}, 400, "is empty"),
        ("/v1/completions", {"prompt": "A", "temperature": -1}, 400, "temperature is -1"),
        ("/v1/completions", {"prompt": "A", "temperature": "hot"}, 400, "must be a number"),
        ("/v1/completions", {"prompt": "A", "max_tokens": 0}, 400, "max_tokens is 0"),
        ("/v1/completions", {"prompt": "A", "n": 1000}, 400, "n is 1000"),
        ("/v1/completions", {"prompt": "A", "seed": 1.5}, 400, "whole number"),
        ("/v1/completions", {"prompt": "A", "suffix": "b"}, 400, "does not support"),
        ("/v1/completions", {"prompt": "A", "stream": "yes"}, 400, "must be of type bool"),
        ("/v1/completions", {"prompt": "A", "stream_options": {"include_usage": True}}, 400, "stream is not true"),
        ("/v1/completions", {"prompt": "A", "stream": True, "stream_options": {"x": 1}}, 400, "stream_options.'x'"),
        ("/v1/completions", {"prompt": "A", "guided_json": {}}, 400, "'guided_json' is no field of completions"),
        ("/v1/completions", {"prompt": "A", "messages": []}, 400, "'messages' is no field of completions"),
        ("/v1/completions", b'{"prompt": "\\ud800"}', 400, "half a surrogate"),
        ("/v1/completions", b'{"prompt": "\xff"}', 400, "not JSON"),
        ("/v1/completions", b'{"prompt": "A", "temperature": NaN}', 400, "temperature is nan"),
        ("/v1/completions", {"prompt": "A", "logit_bias": {"5": 101}}, 400, "at most 100"),
        ("/v1/completions", {"prompt": "A", "logit_bias": {"500": 1}}, 400, "outside the vocabulary"),
        ("/v1/completions", {"prompt": "A", "stop": [""]}, 400, "at least one character"),
        ("/v1/completions", {"prompt": "A", "stop": ["zz"] * 65}, 400, "stop holds 65 texts; 64 are the most"),
        ("/v1/completions", {"prompt": "A", "best_of": 3}, 400, "best_of is 3"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "A"}], "tools": [{}]}, 400, "tools is"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "a text"),
        ("/v1/completions", {"prompt": "A", "model": "gpt-9"}, 404, "'gpt-9' does not exist"),
        ("/v1/chat/completions", {"messages": []}, 400, "messages is missing"),
        ("/v1/chat/completions", {"messages": [{"role": "user"}]}, 400, "messages[0].content"),
        ("/v1/nothing", {}, 404, "is not served"),
    ]

    async def main() -> None:
        async with client(engine_dir, ServerLimits(max_body_bytes=4000)) as (http, llm):
            sound = {"prompt": "AB!", "max_tokens": 240, "temperature": 0, "ignore_eos": True}
            other = asyncio.create_task(http.post("/v1/completions", json=sound))
            for path, body, status, message in cases:
                sent = http.post(path, content=body) if isinstance(body, bytes) else http.post(path, json=body)
                answer = await sent
                wanted = 413 if isinstance(body, bytes) and len(body) > 4000 else status
                assert answer.status_code == wanted, (path, body, answer.text)
                assert wanted != status or message in answer.json()["error"]["message"]
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
            good = await http.post("/v1/completions", json={"prompt": "A", "max_tokens": 2})
            assert good.status_code == 200
            assert (await other).json()["choices"][0]["text"] == expected.text, "others go on undisturbed"
            await wait_until_free(llm)

    asyncio.run(main())


def test_the_api_key_is_asked_for(engine_dir: Path) -> None:
    async def main() -> list[int]:
        async with client(engine_dir, api_key="k1") as (http, _):
            keys = [{}, {"Authorization": "Bearer k2"}, {"Authorization": "Bearer k1"}]
            return [(await http.get("/v1/models", headers=h)).status_code for h in keys]

    assert asyncio.run(main()) == [401, 401, 200]


def test_an_api_key_may_have_any_characters_and_the_scheme_any_case(engine_dir: Path) -> None:
    async def main() -> list[int]:
        async with client(engine_dir, api_key="schlüssel") as (http, _):
            sent = [
                "Bearer schlüssel",
                "bearer  schlüssel",
                "schlüssel",
                "Basic schlüssel",
                "Bearer",
                "Bearer schlussel",
            ]
            headers = [{"Authorization": value.encode()} for value in sent]
            return [(await http.get("/v1/models", headers=h)).status_code for h in headers]

    assert asyncio.run(main()) == [200, 200, 401, 401, 401, 401]


def test_a_full_queue_is_429_with_retry_after_and_others_finish(engine_dir: Path) -> None:
    async def main() -> list[Any]:
        async with client(engine_dir, ServerLimits(max_requests=2)) as (http, _):
            body = {"prompt": "A", "max_tokens": 60, "temperature": 0}
            answers = await asyncio.gather(*(http.post("/v1/completions", json=body) for _ in range(5)))
            later = await http.post("/v1/completions", json=body)
            return [*answers, later, await http.post("/v1/completions", json={**body, "prompt": ["A", "B", "C"]})]

    *answers, later, never = asyncio.run(main())
    assert never.status_code == 400 and "are 3, and the server does 2 at a time" in never.json()["error"]["message"]
    assert sorted(a.status_code for a in answers) == [200, 200, 429, 429, 429] and later.status_code == 200
    refused = next(a for a in answers if a.status_code == 429)
    assert refused.headers["Retry-After"] == "1" and refused.json()["error"]["code"] == "queue_full"


def test_a_request_that_takes_too_long_is_cut_off_and_frees_its_blocks(engine_dir: Path) -> None:
    async def main() -> tuple[Any, Any]:
        async with client(engine_dir, ServerLimits(request_seconds=0.01)) as (http, llm):
            body = {"prompt": "A", "max_tokens": 200, "temperature": 0, "ignore_eos": True}
            whole = await http.post("/v1/completions", json=body)
            stream = await http.post("/v1/completions", json={**body, "stream": True})
            await wait_until_free(llm)
            return whole, stream

    whole, stream = asyncio.run(main())
    assert whole.status_code == 504 and '"code": "timeout"' in stream.text and "[DONE]" not in stream.text


async def wait_until_free(llm: LLM, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while llm.service.open_requests or llm.worker.busy:
        assert time.monotonic() < deadline, "blocks are still held"
        await asyncio.sleep(0.01)
    assert llm.worker.pool.free_blocks == llm.worker.pool.num_blocks


@contextlib.contextmanager
def listening(engine_dir: Path, *flags: str) -> Iterator[tuple[str, Any, threading.Thread]]:
    """A real server on a free port: its address, itself, and its thread."""
    args = serve.parser().parse_args(["--engine_dir", str(engine_dir), "--port", "0", "--device", "cpu", *flags])
    server = serve.server(args)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < deadline and thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}", server, thread
    finally:
        server.should_exit = True
        thread.join(20)


def engine_of(server: Any) -> LLM:
    return server.config.app.state.server.llm


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_blocks(engine_dir: Path, stream: bool) -> None:
    body = {"prompt": "A", "max_tokens": 250, "temperature": 0, "ignore_eos": True, "stream": stream}
    with listening(engine_dir) as (url, server, _):
        if stream:
            with httpx.stream("POST", f"{url}/v1/completions", json=body) as answer:
                next(answer.iter_text())
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{url}/v1/completions", json=body, timeout=httpx.Timeout(5, read=0.05))
        asyncio.run(wait_until_free(engine_of(server), seconds=1))
        assert engine_of(server).worker.statistics.finished == {"abort": 1}
        assert server.config.app.state.server.reserved == 0


def test_shutdown_lets_open_requests_finish(engine_dir: Path) -> None:
    body = {"prompt": "A", "max_tokens": 100, "temperature": 0, "ignore_eos": True, "stream": True}
    with listening(engine_dir, "--served_model_name", "tiny") as (url, server, thread):
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as answer:
            parts = answer.iter_text()
            text = next(parts)
            server.should_exit = True
            text += "".join(parts)
        thread.join(20)
        assert not thread.is_alive()
        assert events(text)[-1]["choices"][0]["finish_reason"] == "length"
        assert engine_of(server).service.closing


def test_a_body_that_never_ends_is_refused(engine_dir: Path) -> None:
    def slowly() -> Iterator[bytes]:
        yield b"{"
        time.sleep(0.5)
        yield b"}"

    with listening(engine_dir, "--body_seconds", "0.1") as (url, _, _):
        assert httpx.post(f"{url}/v1/completions", content=slowly(), timeout=20).status_code == 408


def test_the_key_may_lie_in_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text("secret\n")
    args = ["--engine_dir", "e"]
    assert serve.api_key(serve.parser().parse_args([*args, "--api_key_file", str(tmp_path / "key")])) == "secret"
    monkeypatch.setenv("FP8_API_KEY", "other")
    assert serve.api_key(serve.parser().parse_args(args)) == "other"
    assert serve.parser().parse_args(args).host == "127.0.0.1"


def raw(url: str, request: bytes, receive_buffer: int | None = None) -> socket.socket:
    """A connection that has sent `request` and read nothing."""
    address = urlsplit(url)
    connection = socket.socket()
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(20)
    connection.connect((address.hostname, address.port))
    connection.sendall(request)
    return connection


def post_request(body: dict[str, Any], *headers: str) -> bytes:
    text = json.dumps(body)
    lines = ["POST /v1/completions HTTP/1.1", "Host: x", *headers, f"Content-Length: {len(text)}", "", text]
    return "\r\n".join(lines).encode()


def until(connection: socket.socket, end: bytes) -> bytes:
    received = b""
    while not received.endswith(end):
        received += connection.recv(1000)
    return received


@pytest.mark.parametrize("start", [b"", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX: "])
def test_headers_that_never_end_are_cut_off(engine_dir: Path, start: bytes) -> None:
    with listening(engine_dir, "--body_seconds", "0.3") as (url, server, _):
        connection = raw(url, start)
        begin = time.monotonic()
        assert connection.recv(100) == b""
        assert 0.2 < time.monotonic() - begin < 2 and not server.server_state.connections


def test_headers_may_take_their_time_once_more_on_a_connection_that_is_kept(engine_dir: Path) -> None:
    whole = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    with listening(engine_dir, "--body_seconds", "0.5") as (url, _, _):
        connection = raw(url, whole)
        assert until(connection, b"}").startswith(b"HTTP/1.1 200")
        time.sleep(0.8)  # idle is not slow
        connection.sendall(whole)
        assert until(connection, b"}").startswith(b"HTTP/1.1 200")
        connection.sendall(whole[:9])
        assert connection.recv(1000) == b""


def with_small_buffers(server: Any) -> None:
    """Connections accepted from now on send little that nobody has taken."""
    server.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)


def test_a_client_that_stops_reading_is_cut_off_and_holds_no_blocks(engine_dir: Path) -> None:
    body = {"prompt": "A", "n": 16, "max_tokens": 200, "temperature": 1, "ignore_eos": True, "stream": True}
    with listening(engine_dir, "--stall_seconds", "0.5") as (url, server, _):
        with_small_buffers(server)
        state = server.config.app.state.server
        connection = raw(url, post_request(body), receive_buffer=2048)
        deadline = time.monotonic() + 30
        while not state.reserved:
            time.sleep(0.01)
        while state.reserved and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not state.reserved and not server.server_state.connections
        asyncio.run(wait_until_free(engine_of(server)))
        assert httpx.post(f"{url}/v1/completions", json={"prompt": "A", "max_tokens": 2}).status_code == 200
        with contextlib.suppress(ConnectionResetError):  # what lay in the buffers, and no more
            while part := connection.recv(4096):
                assert b"[DONE]" not in part


def test_a_client_that_reads_slowly_gets_everything(engine_dir: Path) -> None:
    body = {"prompt": "A", "n": 8, "max_tokens": 120, "temperature": 1, "ignore_eos": True, "stream": True}
    request = post_request(body, "Connection: close")
    with listening(engine_dir, "--stall_seconds", "1") as (url, server, _):
        with_small_buffers(server)
        connection, received = raw(url, request, receive_buffer=2048), b""
        while part := connection.recv(4096):
            received += part
            time.sleep(0.01)
        assert received.count(b'"finish_reason": "length"') == 8 and b"[DONE]" in received


@pytest.mark.parametrize("path", [b"/v1/completions", b"/nothing"])
@pytest.mark.parametrize("rest", [b"zz\r\n", b"5\r\n[1,2]zz"])
def test_a_body_that_breaks_off_into_nonsense_is_400_and_no_exception(
    engine_dir: Path, caplog: pytest.LogCaptureFixture, path: bytes, rest: bytes
) -> None:
    chunked = b"POST " + path + b" HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    with listening(engine_dir) as (url, server, _):
        logging.getLogger("uvicorn").addHandler(caplog.handler)
        connection, answer = raw(url, chunked + rest), b""
        while part := connection.recv(1000):
            answer += part
        assert answer.startswith(b"HTTP/1.1 400")
        time.sleep(0.1)
        assert not server.server_state.connections and not server.config.app.state.server.reserved
        logging.getLogger("uvicorn").removeHandler(caplog.handler)
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]


@pytest.mark.parametrize("where", ["a request", "an answer", "a stream"])
def test_an_unexpected_exception_is_told_in_openais_form_and_logged(
    engine_dir: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("a defect")

    body = {"prompt": "A", "max_tokens": 2, "stream": where == "a stream"}
    with listening(engine_dir) as (url, server, _):
        logging.getLogger("uvicorn").addHandler(caplog.handler)
        if where == "a request":
            monkeypatch.setattr(engine_of(server), "request", fail)
        else:
            monkeypatch.setattr(Choice, "take", fail)
        received = b""
        breaks_off = contextlib.suppress(httpx.RemoteProtocolError)  # as a stream does
        with breaks_off, httpx.stream("POST", f"{url}/v1/completions", json=body) as answer:
            for part in answer.iter_bytes():
                received += part
        asyncio.run(wait_until_free(engine_of(server)))
        assert not server.config.app.state.server.reserved
    logging.getLogger("uvicorn").removeHandler(caplog.handler)
    assert answer.status_code == (200 if where == "a stream" else 500) and b"[DONE]" not in received
    assert json.loads(received.removeprefix(b"data: "))["error"] == {
        "message": "the server failed in a way that was not foreseen; its log says how", "type": "server_error",
        "param": None, "code": "internal_error",
    }  # fmt: skip
    assert [r.exc_info[0] for r in caplog.records if r.exc_info] == [ZeroDivisionError]


def test_bad_clients_beside_a_sound_one_change_nothing_for_it(engine_dir: Path) -> None:
    """Garbage, half requests, bodies of another length than they say or of no end, and connections torn off."""
    sound = {"prompt": "AB!", "max_tokens": 240, "temperature": 0, "ignore_eos": True}
    (expected,) = LLM(engine_dir, "cpu").generate(["AB!"], SamplingParams(max_tokens=240, ignore_eos=True))
    whole = post_request({**sound, "stream": True})
    chunked = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    starts = {
        "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        "half a header": whole[:40],
        "half a body": whole[:-20],
        "more body than it says": whole + b"}}}}",
        "chunks without end": chunked + b"fa0\r\n" + b"[" * 4000 + b"\r\n",
        "a chunk of no length": chunked + b"zz\r\n",
        "no length at all": b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        "torn off in the stream": whole,
    }
    with listening(engine_dir, "--max_body_bytes", "2000", "--body_seconds", "2") as (url, server, _):
        state, answers = server.config.app.state.server, []

        def ask() -> None:
            for _ in range(4):
                answers.append(httpx.post(f"{url}/v1/completions", json=sound, timeout=60).json()["choices"][0]["text"])

        asking = threading.Thread(target=ask)
        asking.start()
        while asking.is_alive():
            connections = [raw(url, start) for start in starts.values()]
            time.sleep(0.1)
            for connection in connections:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset, not ended
                connection.close()
        assert answers == [expected.text] * 4
        asyncio.run(wait_until_free(engine_of(server)))
        deadline = time.monotonic() + 5
        while (state.reserved or server.server_state.connections) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not state.reserved and not server.server_state.connections


@pytest.mark.parametrize("framing", [["Content-Length: 999999"], ["Transfer-Encoding: chunked"]])
def test_a_body_that_is_too_large_is_refused_before_it_is_all_there(engine_dir: Path, framing: list[str]) -> None:
    head = "\r\n".join(["POST /v1/completions HTTP/1.1", "Host: x", *framing, "", ""]).encode()
    part = b"[" * 3000
    with listening(engine_dir, "--max_body_bytes", "2000") as (url, server, _):
        connection = raw(url, head + (b"bb8\r\n" + part + b"\r\n" if "chunked" in framing[0] else part))
        assert connection.recv(1000).startswith(b"HTTP/1.1 413")
        assert not server.config.app.state.server.reserved


def test_a_shutdown_waits_no_longer_than_it_should_and_takes_nothing_new(
    engine_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"prompt": "A", "max_tokens": 250, "temperature": 0, "ignore_eos": True, "stream": True}
    with listening(engine_dir, "--drain_seconds", "1") as (url, server, thread):
        llm, state = engine_of(server), server.config.app.state.server
        step = llm.worker.step
        monkeypatch.setattr(llm.worker, "step", lambda: (time.sleep(0.1), step())[1])  # 25 s for the whole answer
        kept = httpx.Client(base_url=url, timeout=30)
        assert kept.get("/health").json() == {"status": "ok"}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as answer:
            parts = answer.iter_text()
            next(parts)
            state.draining = True  # as after a signal, but that connections are not closed yet
            assert kept.get("/health").status_code == 503
            refused = kept.post("/v1/completions", json={**body, "stream": False})
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
            state.draining, begin = False, time.monotonic()
            server.handle_exit(signal.SIGTERM, None)
            assert state.draining
            with contextlib.suppress(httpx.RemoteProtocolError):
                assert "[DONE]" not in "".join(parts)
        thread.join(20)
        assert not thread.is_alive() and 0.5 < time.monotonic() - begin < 6
        assert llm.worker.pool.free_blocks == llm.worker.pool.num_blocks
