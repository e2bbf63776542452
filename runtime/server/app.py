"""The application: routes, limits and errors over one AsyncLLM. How it listens is fp8-serve's business."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from fp8.builder.engine import EngineError
from fp8.runtime.async_llm import AsyncLLM
from fp8.runtime.llm import Delta
from fp8.runtime.request import Request as Generation
from fp8.runtime.request import RequestError
from fp8.runtime.server.choice import Choice, joined
from fp8.runtime.server.metrics import exposition
from fp8.runtime.server.protocol import Answer, ClientError, Order, parse_order, usage
from fp8.runtime.service import ServiceError

UNFORESEEN = ClientError(
    500, "the server failed in a way that was not foreseen; its log says how", "server_error", code="internal_error"
)


@dataclass(frozen=True)
class ServerLimits:
    """`max_requests` may be open, waiting ones included; beyond them a client is asked to come back. `body_seconds` are
    for the headers, too; `stall_seconds` for a client that reads nothing (server/connection.py keeps both)."""

    max_requests: int = 256
    max_body_bytes: int = 4 << 20
    body_seconds: float = 30.0
    stall_seconds: float = 30.0
    request_seconds: float = 600.0
    drain_seconds: float = 30.0


class Server:
    """State of the application. Everything runs on one event loop; the engine's steps in a thread of their own."""

    def __init__(self, engine: AsyncLLM, model: str, limits: ServerLimits, api_key: str | None) -> None:
        self.engine, self.model, self.limits, self.api_key = engine, model, limits, api_key
        self.llm = engine.llm
        self.started = int(time.time())
        self.refused = 0
        self.reserved = 0  # requests accepted and not ended
        self.draining = False

    async def answer(self, http: Request, chat: bool) -> Response:
        """A completion or a chat completion, whole or as a stream of events."""
        self.authorize(http)
        order = parse_order(await self._body(http), self.model, chat)
        generations = await asyncio.to_thread(self._generations, order)
        self._reserve(len(generations))
        if order.stream:
            return EventStream(self._events(order, generations), lambda: self._release(len(generations)))
        try:
            return await self._unless_disconnected(http, self._whole(order, generations))
        finally:
            self._release(len(generations))

    def authorize(self, http: Request) -> None:
        """Raises ClientError unless the request carries the API key, if there is one."""
        scheme, _, given = http.headers.get("authorization", "").partition(" ")
        key = given.strip().encode("latin-1") if scheme.lower() == "bearer" else b""  # the bytes that were sent
        if self.api_key is not None and not hmac.compare_digest(key, self.api_key.encode()):
            raise ClientError(401, "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'",
                              "authentication_error", code="invalid_api_key")  # fmt: skip

    async def _body(self, http: Request) -> bytes:
        """The body, bounded in size and time."""
        body, most = bytearray(), self.limits.max_body_bytes
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                async for part in http.stream():
                    body += part
                    if len(body) > most:
                        raise ClientError(413, f"the body has more than {most} bytes", code="body_too_large")
        except TimeoutError as error:
            raise ClientError(408, f"the body took longer than {self.limits.body_seconds} s", code="timeout") from error
        return bytes(body)

    def _generations(self, order: Order) -> list[Generation]:
        """The engine's requests for an order, prompt by prompt, n of each; raises ClientError for one it cannot do."""
        try:
            prompts = order.prompts
            if order.messages is not None:
                prompts = [self.llm.chat_template.encode(order.messages)]
            made = []
            for i, prompt in enumerate(prompts):
                for k in range(order.n):
                    made.append(self.llm.request(prompt, order.params, i, k, order.priority, order.user))
                    self.llm.worker.scheduler.check(made[-1])
            return made
        except (RequestError, EngineError) as error:
            code = "context_length_exceeded" if "max_seq_len" in str(error) else None
            raise ClientError(400, str(error), param="messages" if order.chat else "prompt", code=code) from error

    def _reserve(self, count: int) -> None:
        if self.draining:
            raise ClientError(503, "the server is shutting down", "server_error", code="shutting_down")
        if count > self.limits.max_requests:
            raise ClientError(400, f"prompts times n are {count}, and the server does {self.limits.max_requests} at a "
                              "time; ask for fewer", param="n")  # fmt: skip
        if self.reserved + count > self.limits.max_requests:
            self.refused += 1
            raise ClientError(429, f"{self.reserved} requests are under way, and {self.limits.max_requests} may be; "
                              f"try again later", "rate_limit_error", code="queue_full")  # fmt: skip
        self.reserved += count

    def _release(self, count: int) -> None:
        self.reserved -= count

    async def _whole(self, order: Order, generations: list[Generation]) -> Response:
        found: list[list[Delta]] = [[] for _ in generations]
        try:
            async with asyncio.timeout(self.limits.request_seconds), self._deltas(generations) as deltas:
                async for i, delta in deltas:
                    found[i].append(delta)
        except (TimeoutError, ServiceError) as error:
            raise self._failure(error) from error
        whole = [joined(deltas) for deltas in found]
        outputs = [choice.take(delta) for choice, delta in zip(self._choices(order, generations), whole, strict=True)]
        used = usage(_prompt_tokens(order, generations), sum(len(delta.token_ids) for delta in whole))
        return JSONResponse(Answer(order).whole(outputs, [delta.finish_reason for delta in whole], used))

    def _choices(self, order: Order, generations: list[Generation]) -> list[Choice]:
        echoed = [order.prompts[i // order.n] if order.echo else None for i in range(len(generations))]
        return [Choice(g, self.llm.tokenizer, order.chat, p) for g, p in zip(generations, echoed, strict=True)]

    def _deltas(self, generations: list[Generation]) -> aclosing[AsyncGenerator[tuple[int, Delta], None]]:
        return aclosing(_merge([self.engine.run(g) for g in generations]))

    def _failure(self, error: Exception) -> ClientError:
        if isinstance(error, ServiceError):
            return ClientError(503, str(error), "server_error")
        message = f"the request took longer than {self.limits.request_seconds} s"
        return ClientError(504, message, "server_error", code="timeout")

    async def _unless_disconnected(self, http: Request, work: Any) -> Response:
        """Runs `work`; a client that leaves cancels it."""
        task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(http))
        try:
            await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
            return await task if task.done() else Response(status_code=499)
        finally:
            for future in (task, gone):
                future.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)

    async def _events(self, order: Order, generations: list[Generation]) -> AsyncGenerator[str, None]:
        """Server-sent events; those of several choices come as they are made."""
        answer, choices, begun, count = Answer(order), self._choices(order, generations), set(), 0
        try:
            async with asyncio.timeout(self.limits.request_seconds), self._deltas(generations) as deltas:
                async for i, delta in deltas:
                    count += len(delta.token_ids)
                    if delta.text or delta.logprobs or delta.finish_reason or i not in begun:
                        chunk = answer.chunk(i, choices[i].take(delta), delta.finish_reason, i not in begun)
                        begun.add(i)
                        yield _event(chunk)
            if order.include_usage:
                yield _event(answer.last_chunk(usage(_prompt_tokens(order, generations), count)))
            yield "data: [DONE]\n\n"
        except (TimeoutError, ServiceError) as error:
            yield _event(self._failure(error).body)
        except Exception:
            yield _event(UNFORESEEN.body)
            raise


class EventStream(StreamingResponse):
    """Calls `release` at its end, however it ends: also where the client left before the first event."""

    def __init__(self, events: AsyncGenerator[str, None], release: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._events, self._release = events, release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._release()
            await self._events.aclose()


def create_app(engine: AsyncLLM, model: str, limits: ServerLimits | None = None, api_key: str | None = None) -> FastAPI:
    """The application; `app.state.server` is its Server. Its shutdown drains the engine and closes it."""
    server = Server(engine, model, limits or ServerLimits(), api_key)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        server.llm.service.start()
        yield
        server.draining = True
        await engine.close(server.limits.drain_seconds)

    app = FastAPI(title="fp8-serve", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.server = server
    app.add_exception_handler(ClientError, _error_response)
    app.add_exception_handler(404, _unknown_path)
    app.add_exception_handler(405, _unknown_path)
    app.add_exception_handler(ClientDisconnect, _client_left)
    app.add_exception_handler(Exception, _defect)
    _add_routes(app, server)
    return app


def _add_routes(app: FastAPI, server: Server) -> None:
    card = {"id": server.model, "object": "model", "created": server.started, "owned_by": "fp8-engine"}

    @app.post("/v1/completions")
    async def completions(http: Request) -> Response:
        return await server.answer(http, chat=False)

    @app.post("/v1/chat/completions")
    async def chat_completions(http: Request) -> Response:
        return await server.answer(http, chat=True)

    @app.get("/v1/models")
    async def models(http: Request) -> Response:
        server.authorize(http)
        return JSONResponse({"object": "list", "data": [card]})

    @app.get("/v1/models/{name:path}")
    async def one_model(http: Request, name: str) -> Response:
        server.authorize(http)
        if name != server.model:
            raise ClientError(404, f"the model {name!r} does not exist", param="model", code="model_not_found")
        return JSONResponse(card)

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "draining" if server.draining else "ok"}, 503 if server.draining else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(exposition(server.llm.worker, server.refused), media_type="text/plain; version=0.0.4")


async def _error_response(_: Request, error: Exception) -> Response:
    assert isinstance(error, ClientError)
    return JSONResponse(error.body, error.status, headers={"Retry-After": "1"} if error.status in (429, 503) else None)


async def _unknown_path(http: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    return JSONResponse(ClientError(status, f"{http.method} {http.url.path} is not served here").body, status)


async def _defect(_: Request, error: Exception) -> Response:
    return JSONResponse(UNFORESEEN.body, UNFORESEEN.status)  # the exception goes on to the listener, which logs it


async def _client_left(_: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _disconnected(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _merge(sources: list[AsyncGenerator[Delta, None]]) -> AsyncGenerator[tuple[int, Delta], None]:
    """(index, delta) of all sources as they come; closes all of them when it is closed, or when one fails."""
    events: asyncio.Queue[tuple[int, Delta | BaseException | None]] = asyncio.Queue()

    async def forward(index: int, source: AsyncGenerator[Delta, None]) -> None:
        try:
            async with aclosing(source):
                async for delta in source:
                    events.put_nowait((index, delta))
            events.put_nowait((index, None))
        except Exception as error:
            events.put_nowait((index, error))

    tasks = [asyncio.create_task(forward(i, source)) for i, source in enumerate(sources)]
    try:
        left = len(sources)
        while left:
            index, event = await events.get()
            if isinstance(event, BaseException):
                raise event
            if event is None:
                left -= 1
            else:
                yield index, event
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _prompt_tokens(order: Order, generations: list[Generation]) -> int:
    return sum(len(g.prompt) for g in generations[:: order.n])


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
