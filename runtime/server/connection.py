"""Connections that no client can hold for ever, by headers without end or by taking nothing of what it is sent."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


def guarded(head_seconds: float, stall_seconds: float) -> type[H11Protocol]:
    """uvicorn's protocol, which cuts a connection whose request line and headers take longer than `head_seconds`, or
    whose client takes nothing for `stall_seconds` while something is to be sent. The request then ends as it does
    where a client leaves."""

    class GuardedProtocol(H11Protocol):
        _head: asyncio.TimerHandle | None = None
        _stall: asyncio.TimerHandle | None = None
        _unsent = 0

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            transport.set_write_buffer_limits(0)  # whatever the kernel does not take at once pauses the writer
            self._head = self.loop.call_later(head_seconds, transport.abort)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                self._head = _stop(self._head)
            elif self._head is None:  # the next request of the connection has begun
                self._head = self.loop.call_later(head_seconds, self.transport.abort)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._unsent = self.transport.get_write_buffer_size()
            self._stall = self.loop.call_later(stall_seconds, self._look)

        def _look(self) -> None:
            left = self.transport.get_write_buffer_size()
            if left >= self._unsent:
                self.transport.abort()
                return
            self._unsent = left
            self._stall = self.loop.call_later(stall_seconds, self._look)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._stall = _stop(self._stall)

        def send_400_response(self, msg: str) -> None:
            """The answer to what turns out to be no HTTP, after headers that were: these need no other any more."""
            super().send_400_response(msg)
            if self.cycle is not None:
                self.cycle.disconnected = True
                self.cycle.message_event.set()

        def connection_lost(self, exc: Exception | None) -> None:
            self._head, self._stall = _stop(self._head), _stop(self._stall)
            super().connection_lost(exc)

    return GuardedProtocol


def _stop(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """What is left of a timer: none."""
    if timer is not None:
        timer.cancel()
    return None
