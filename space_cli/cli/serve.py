"""`space serve`: serves models over OpenAI's HTTP interface."""

from __future__ import annotations

import os
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import Field

from space_cli.cli import options
from space_cli.cli.groups import Group, grouped
from space_cli.cli.texts import corpus_progress
from space_cli.errors import UsageProblem, opening
from space_cli.text import read_text

if TYPE_CHECKING:
    from space_cli.api import Model
    from space_cli.server.guard import Access

EPILOG = "Example: space serve --model nano    Then: curl http://127.0.0.1:8000/v1/models"

_Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        "-m",
        help="Alias, folder, GGUF file, or Hub id, loaded at the start; repeatable, further ones are loaded when asked"
        f" for. {options.DEFAULT_MODEL}",
        autocompletion=options.complete_model,
    ),
]


class AccessOptions(Group):
    """Where the server listens, and to whom."""

    host: str = Field("127.0.0.1", description="Address to listen on; any other than this machine's needs a key.")
    port: int = Field(8000, ge=0, le=65535, description="0 takes a free one and says which.")
    api_key_file: Annotated[
        Path | None,
        options.path_option("--api-key-file", "The key that requests must bring; else SPACE_API_KEY has it."),
    ] = None
    allow_host: list[str] | None = Field(None, description="A name by which the server may be called; repeatable.")
    allow_origin: list[str] | None = Field(
        None, description="A web page that may call, as https://chat.example; repeatable."
    )

    def access(self) -> Access:
        """Return the access rules.

        Raises:
            UsageProblem: others can reach the address, and there is no key.
        """
        from space_cli.server.guard import Access, is_loopback, known_hosts

        key = _api_key(self.api_key_file)
        if key is None and not is_loopback(self.host):
            raise UsageProblem(
                f"--host {self.host}: others can reach this address",
                hint="give a key by SPACE_API_KEY or --api-key-file",
            )
        return Access(key, known_hosts(self.host, self.allow_host or ()), frozenset(self.allow_origin or ()))


class LimitOptions(Group):
    """How much the server takes on."""

    max_models: int = Field(1, ge=1, description="Models in memory at once.")
    parallel: int = Field(4, ge=1, description="Requests under way at once, a step of each in turn.")
    queue: int = Field(64, ge=1, description="Requests that may wait; one more gets a 429.")
    max_new_tokens: int = Field(1024, ge=1, description="Most tokens of an answer whose request says nothing of it.")
    cache_mib: int = Field(1024, ge=0, description="Memory for conversations between requests, of each model.")
    body_mib: int = Field(4, ge=1, description="Largest body of a request.")


class ServedModelOptions(options.LoadOptions):
    """How models are loaded and run."""

    engine: options.Engine = "auto"
    template: options.Template = None
    corpus: options.Corpus = None


_LogPrompts = Annotated[bool, typer.Option("--log-prompts", help="Write prompts into the log, too.")]


@grouped
def serve(
    *,
    model: _Models = None,
    place: AccessOptions,
    limit: LimitOptions,
    log_prompts: _LogPrompts = False,
    models: ServedModelOptions,
    quiet: options.Quiet = False,
) -> int:
    """Serve models over HTTP, for editors, agents and scripts that speak OpenAI's interface."""
    if any(find_spec(name) is None for name in ("starlette", "uvicorn", "prometheus_client")):
        raise UsageProblem("serve needs starlette and uvicorn", hint="pip install 'space-decoding[serve]'")
    access = place.access()

    from space_cli.cli.console import err, loading, note, quiet_libraries
    from space_cli.cli.live import COMPILING, EAGER
    from space_cli.server.guard import listen

    # bind the address before the slow imports, so that a busy one fails at once
    listening = listen(place.host, place.port)
    tell = partial(note, quiet=quiet)
    # once, whatever number of models is loaded
    tell_eager = cache(lambda reason: tell(f"{EAGER}: {reason}"))

    def loaded_by(name: str) -> Model:
        from space_cli import api

        with corpus_progress(quiet=quiet or not models.corpus) as show:
            loaded = api.load(
                name,
                **models.model_dump(),
                cache_bytes=limit.cache_mib * 2**20,
                on_compile=lambda: tell(COMPILING),
                on_eager=tell_eager,
                on_progress=show,
                on_problem=tell,
            )
        # measure step costs now rather than in the first answer
        loaded.drafts("space")
        return loaded

    names = model or [options.named_model(None, quiet=quiet)]
    with loading(names[0], err(), quiet=quiet):
        quiet_libraries()

        from space_cli.server.app import Limits, Server
        from space_cli.server.run import run
        from space_cli.server.shelf import Shelf

        shelf = Shelf(names, loaded_by, most=limit.max_models, models_file=models.models_file)
        shelf.preload()
    limits = Limits(
        body_bytes=limit.body_mib * 2**20,
        new_tokens=limit.max_new_tokens,
        parallel=limit.parallel,
        waiting=limit.queue,
    )
    return run(Server(shelf, limits, log_prompts=log_prompts), access, listening, tell=tell)


def _api_key(file: Path | None) -> str | None:
    """Return the key that requests must bring, or None."""
    if file is None:
        return os.environ.get("SPACE_API_KEY") or None
    with opening(f"--api-key-file {file}"):
        key = read_text(file).strip()
    if not key:
        raise UsageProblem(f"--api-key-file {file}: is empty")
    return key
