"""AsyncLLM: the same engine for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from fp8.runtime.llm import LLM, Delta, DeltaSource, Prompt, check_stream
from fp8.runtime.request import Request, SamplingParams


class AsyncLLM:
    """An LLM whose steps run in a thread of their own; the event loop only passes tokens on.

    async for delta in AsyncLLM(LLM("engine")).generate("def fibonacci(n):"):
        print(delta.text, end="", flush=True)
    """

    def __init__(self, llm: LLM) -> None:
        self.llm = llm

    async def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, priority: int = 0, user: str = ""
    ) -> AsyncGenerator[Delta, None]:
        """What comes of a prompt, as it comes. Closing the iterator, or cancelling the task, cancels the request.

        Raises RequestError for a prompt that cannot be served, ServiceError if the engine fails or shuts down.
        """
        request = await asyncio.to_thread(self.llm.request, prompt, params or SamplingParams(), 0, 0, priority, user)
        async with aclosing(self.run(request)) as deltas:
            async for delta in deltas:
                yield delta

    async def run(self, request: Request) -> AsyncGenerator[Delta, None]:
        """The same for a request that `LLM.request` has made."""
        check_stream(request)
        loop, events = asyncio.get_running_loop(), asyncio.Queue[tuple[list[int], str | None]]()
        service, source = self.llm.service, DeltaSource(self.llm, request)

        def listen(_: Request) -> None:
            if not loop.is_closed():  # a loop that ended has nobody left to tell
                loop.call_soon_threadsafe(events.put_nowait, source.news())

        service.start()
        service.submit(request, listen)
        try:
            finish_reason = None
            while finish_reason is None:
                new, finish_reason = await events.get()
                yield source.take(new, finish_reason)
        finally:
            service.cancel(request)

    async def close(self, drain_seconds: float = 0.0) -> None:
        """Ends the engine's thread; open requests have `drain_seconds` to finish."""
        await asyncio.to_thread(self.llm.close, drain_seconds)
