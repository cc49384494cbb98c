"""`python -m mmkernels serve`: the model over HTTP, and a page to try it on."""

import argparse
import os
import sys
from pathlib import Path

from mmkernels._core.packages import require
from mmkernels.serving.load import NEEDS, open_model

API_KEY = "MMKERNELS_API_KEY"


def main(argv: list[str] | None = None) -> int:
    """Serves until it is told to stop.

    Args:
        argv: the arguments after `serve`; None: those of the process.

    Returns:
        0, or 2 where there is no such model.

    Raises:
        ModuleNotFoundError: a package is missing; the message names all that are.
    """
    options = _parser().parse_args(argv)
    require({**NEEDS, "fastapi": "fastapi", "uvicorn": "uvicorn"}, "serve")
    import uvicorn

    from mmkernels.serving.engine import Engine
    from mmkernels.serving.protocol import Limits
    from mmkernels.serving.server import Settings, create_app

    try:
        name, model = open_model(options.model)
        model.use_kernels(not options.eager)
        engine = Engine(
            model,
            name=name,
            slots=options.slots,
            queue=options.queue,
            context=options.context,
            timeout=options.timeout,
        )
    except ValueError as error:
        print(f"mmkernels serve: {error}", file=sys.stderr)
        return 2
    key = options.api_key or os.environ.get(API_KEY) or None
    if key is None and options.host not in ("127.0.0.1", "localhost", "::1"):
        print(f"Anyone who reaches {options.host} may ask: --api-key or {API_KEY} would bar them.")
    limits = Limits(body_bytes=options.max_body_mb << 20)
    try:
        uvicorn.run(
            create_app(engine, Settings(api_key=key, limits=limits)),
            host=options.host,
            port=options.port,
            log_level=options.log_level,
            timeout_graceful_shutdown=30,
        )
    finally:
        engine.close()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mmkernels serve", description=__doc__)
    parser.add_argument("--model", metavar="NAME|DIR", type=Path, help="what answers (tiny)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (8000)")
    parser.add_argument(
        "--api-key", metavar="KEY", help=f"what requests must show; or set {API_KEY}"
    )
    parser.add_argument("--slots", type=int, default=32, help="answers at the same time (32)")
    parser.add_argument("--queue", type=int, default=128, help="requests that may wait (128)")
    parser.add_argument(
        "--context", type=int, default=1024, help="tokens of a conversation and its answer (1024)"
    )
    parser.add_argument(
        "--timeout", type=float, default=120.0, help="seconds an answer may take (120)"
    )
    parser.add_argument("--max-body-mb", type=int, default=8, help="largest request, in MiB (8)")
    parser.add_argument("--eager", action="store_true", help="run on eager PyTorch")
    parser.add_argument("--log-level", default="info", help="of the web server (info)")
    return parser
