"""fp8-serve: an engine behind OpenAI's HTTP interface."""

from __future__ import annotations

import argparse
import gc
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from fp8.builder.engine import EngineError
from fp8.runtime.async_llm import AsyncLLM
from fp8.runtime.llm import LLM
from fp8.runtime.policy import POLICIES
from fp8.scripts.argument_types import port, positive, seconds
from fp8.scripts.moved_flags import CommandParser
from fp8.scripts.ranks import on_all_ranks
from fp8.scripts.run import ERRORS, add_session_arguments
from fp8.scripts.teaching import Teaching

API_KEY_VARIABLE = "FP8_API_KEY"
EXAMPLES = """\
examples:
  fp8-serve --engine_dir engine --port 8000
  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
       -d '{"model": "engine", "prompt": "def main():", "max_tokens": 16}'
"""


def parser() -> argparse.ArgumentParser:
    p = CommandParser(
        "fp8-serve",
        description="Serves an engine: OpenAI-compatible completions and chat.",
        epilog=EXAMPLES,
        formatter_class=Teaching,
    )
    p.add_argument("--engine_dir", required=True, help="as fp8-build writes it")
    p.add_argument("--host", default="127.0.0.1", help="address to listen on; by default only this machine can connect")
    p.add_argument("--port", type=port, default=8000, help="0: any free one")
    p.add_argument("--served_model_name", help="model name for clients (default: the name of the engine directory)")
    key = p.add_mutually_exclusive_group()
    key.add_argument("--api_key", help=f"what clients must send (default: ${API_KEY_VARIABLE}, or nothing)")
    key.add_argument(
        "--api_key_file", type=Path, help="a file with the key, so that it does not show in the list of processes"
    )
    p.add_argument("--policy", choices=sorted(POLICIES), default="throughput", help="how requests share the engine")
    p.add_argument(
        "--max_requests", type=positive, default=256, help="open at the same time; more are answered with 429"
    )
    p.add_argument("--max_body_bytes", type=positive, default=4 << 20, help="refuse a larger request")
    p.add_argument("--body_seconds", type=seconds, default=30.0, help="refuse a request that takes longer to arrive")
    p.add_argument(
        "--stall_seconds", type=seconds, default=30.0, help="cut off a client that reads nothing for so long"
    )
    p.add_argument("--request_seconds", type=seconds, default=600.0, help="cut off an answer that takes longer")
    p.add_argument(
        "--drain_seconds", type=seconds, default=30.0, help="at shutdown, give open requests so long to finish"
    )
    add_session_arguments(p)
    return p


def api_key(args: argparse.Namespace) -> str | None:
    """The key of the arguments, the file or the environment. Raises EngineError for a file without one."""
    if args.api_key_file is None:
        return args.api_key or os.environ.get(API_KEY_VARIABLE) or None
    try:
        key = args.api_key_file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise EngineError(f"{args.api_key_file} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not key:
        raise EngineError(f"{args.api_key_file} is empty; write the API key there")
    return str(key)


def check_address(host: str, port: int) -> None:
    """Raises EngineError if no one can listen there: known before the engine is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise EngineError(
            f"--host {host} --port {port} cannot be listened on: {error.strerror or error}; choose another; --port 0 "
            "takes a free one"
        ) from error


def server(args: argparse.Namespace) -> Any:
    """A uvicorn server, ready to run. Raises EngineError without the packages of the extra `serve`."""
    try:
        import uvicorn

        from fp8.runtime.server.app import ServerLimits, create_app
        from fp8.runtime.server.connection import guarded
    except ImportError as error:
        raise EngineError(f"fp8-serve needs {error.name}; install fp8-engine[serve]") from error

    class DrainingServer(uvicorn.Server):
        """Says so in /health from the first signal on."""

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            app.state.server.draining = True
            super().handle_exit(sig, frame)

    key = api_key(args)
    check_address(args.host, args.port)
    llm = LLM(
        args.engine_dir,
        args.device,
        args.max_kv_blocks,
        args.kv_cache_free_gpu_memory_fraction,
        policy=args.policy,
        world=args.world,
    )
    limits = ServerLimits(
        args.max_requests,
        args.max_body_bytes,
        args.body_seconds,
        args.stall_seconds,
        args.request_seconds,
        args.drain_seconds,
    )
    name = args.served_model_name or Path(args.engine_dir).resolve().name
    gc.collect()
    gc.freeze()  # the modules and the engine stay: the collector need not go through them while steps wait
    app = create_app(AsyncLLM(llm), name, limits, key)
    config = uvicorn.Config(
        app, args.host, args.port, log_level="info", access_log=False, timeout_keep_alive=30,
        timeout_graceful_shutdown=max(1, round(args.drain_seconds)),
        http=guarded(limits.body_seconds, limits.stall_seconds),
    )  # fmt: skip
    return DrainingServer(config)


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return on_all_ranks("fp8-serve", args, command)


class Terminated(Exception):
    """SIGTERM, once requests have been drained."""


def terminate(*_: object) -> None:
    raise Terminated


def command(args: argparse.Namespace) -> int:
    if args.world is not None:
        # The server raises the signal again once it has drained: the other ranks are to be stopped before it ends this.
        signal.signal(signal.SIGTERM, terminate)
    try:
        server(args).run()
    except Terminated:
        return 0
    except ERRORS as error:
        print(f"fp8-serve: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
