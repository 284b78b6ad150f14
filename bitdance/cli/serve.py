"""`bitdance serve`: pictures over HTTP, in the form of OpenAI's images API.

    bitdance serve                                        the bundled model on http://127.0.0.1:8000
    bitdance serve --model models/B-16x --port 9000 --api-key SECRET --batch-size 16

The first SIGTERM or SIGINT finishes what was begun and refuses what waits; a second one gives up what was begun, too.
"""

import importlib.util
import os
import sys
from collections.abc import Sequence
from functools import partial

from bitdance.cli import Parser, UsageError, print_page, report
from bitdance.cli.options import DTYPE_HELP, DTYPE_NAMES
from bitdance.values import from_text

NEEDS = {"fastapi": "fastapi", "uvicorn": "uvicorn", "multipart": "python-multipart", "prometheus_client": "prometheus-client"}
KEY = "BITDANCE_API_KEY"


def parser() -> Parser:
    """The options."""
    parser = Parser(prog="bitdance serve", description="Pictures over HTTP, in the form of OpenAI's images API.")
    parser.add_argument("--model", metavar="DIR|demo", default="demo", help="model folder of any kind (default: demo)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine alone)")
    parser.add_argument("--port", default="8000", help="port; 0 takes a free one (default: 8000)")
    parser.add_argument("--api-key", metavar="KEY", help=f"what clients must send as a Bearer token (default: ${KEY}, else none)")
    parser.add_argument("--queue", metavar="N", help="requests that may wait; one more gets 429 (default: 64)")
    parser.add_argument("--batch-size", metavar="B", help="pictures made at once (default: 8)")
    parser.add_argument("--time-limit", metavar="SECONDS", help="for a request, waiting included (default: 600)")
    parser.add_argument("--device", nargs="+", help="cpu, cuda, cuda:1, …; several: the model on each (default: cuda, else cpu)")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, help=DTYPE_HELP)
    parser.add_argument("--cors", nargs="+", metavar="ORIGIN", default=[], help="pages of other origins that may call")
    return parser


def run(argv: Sequence[str]) -> int:
    """Check, bind, load, serve; the exit code is that of the command."""
    options = parser().parse_args(argv)
    if missing := [package for name, package in NEEDS.items() if importlib.util.find_spec(name) is None]:
        raise UsageError(f"serve needs {', '.join(missing)}; install the extra: pip install 'bitdance[serve]'")

    from bitdance.serve.settings import Limits, check_origins

    check_origins(options.cors)
    names = {"queue": "queue", "batch_size": "batch_size", "time_limit": "seconds"}
    given = {name: text for name in names if (text := getattr(options, name)) is not None}
    limits = Limits(**{names[name]: from_text(name, text, f"--{name.replace('_', '-')}") for name, text in given.items()})
    port = from_text("port", options.port, "--port")
    key = options.api_key or os.environ.get(KEY) or None
    if key is not None and not (key.isascii() and key.isprintable()):
        raise UsageError("--api-key: letters, digits and signs of ASCII are allowed")

    from bitdance.serve.server import address_of, listening_socket, serve

    try:
        bound = listening_socket(options.host, port)
    except (OSError, UnicodeError) as error:  # the second for what is no name of a machine
        why = getattr(error, "strerror", None) or error
        raise UsageError(f"--host {options.host} --port {port}: {why}") from None
    with bound:
        if key is None and not bound.getsockname()[0].startswith(("127.", "::1")):
            report("anyone who reaches this address can use it; --api-key KEY asks for a key", "warning")
        from bitdance.serve.api import create_app
        from bitdance.serve.model import ServedModel

        model = ServedModel.load(options.model, options.device or (None,), options.dtype)
        app = create_app(model, limits, key, options.cors)
        address = address_of(bound)
        lines = [f"bitdance serves {model.name} ({model.pipe.kind}, {model.pipe.device}) at {address}", "Ctrl+C ends it"]
        server = serve(app, bound, partial(_say, lines))
    if server.exit_code:
        report(server.last_words, "stopped")
    return server.exit_code


def _say(lines: Sequence[str]) -> None:
    print_page(lines)
    sys.stdout.flush()
