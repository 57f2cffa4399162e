"""Loading a model that answers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from space_cli.api.caches import MAX_BYTES
from space_cli.api.model import Model
from space_cli.core.threads import release_threads
from space_cli.models.corpora import OnProgress, read_corpus
from space_cli.models.engines import EngineName, prepare
from space_cli.models.loading import load_model
from space_cli.models.registry import default_model


def load(
    model: str | None = None,
    *,
    models_file: Path | None = None,
    dtype: str = "auto",
    device: str = "auto",
    quantization: str = "none",
    engine: EngineName = "auto",
    revision: str | None = None,
    template: str | None = None,
    corpus: Sequence[Path] | None = None,
    cache_bytes: int = MAX_BYTES,
    on_compile: Callable[[], None] = lambda: None,
    on_eager: Callable[[str], None] = lambda _: None,
    on_progress: OnProgress = lambda *_: None,
    on_problem: Callable[[str], None] = warnings.warn,
) -> Model:
    """Load a model that answers.

    Args:
        model: an alias of models.toml, a folder, a GGUF file, or a Hub id; None is smollm2 if installed, else nano.
        models_file: a user's own models.toml.
        dtype: auto, float32, bfloat16 or float16.
        device: auto, cpu, cuda, cuda:N or mps.
        quantization: none; q8_0 or q4_0, as GGUF files have them, on a CPU; int8, nf4 or fp4 (bitsandbytes).
        engine: auto, eager or compiled.
        revision: branch, tag or commit of a Hub id.
        template: a template with one {} in place of the tokenizer's own.
        corpus: files or folders with text that answers may repeat, to copy drafts from (docs/drafts.md).
        cache_bytes: of keys and values kept from answer to answer.
        on_compile: called before a compilation, which takes a minute or more (docs/engines.md).
        on_eager: called where the model would be faster compiled and cannot be now, with the reason.
        on_progress: see `space_cli.models.corpora.read_corpus`.
        on_problem: the same.

    Raises:
        UsageProblem: no such model, or one that cannot work; no text in the corpus.
        RunFailed: engine is compiled and it cannot be.
    """
    loaded = load_model(
        model or default_model(),
        models_file=models_file,
        dtype=dtype,
        device=device,
        quantization=quantization,
        revision=revision,
    )
    if corpus:
        loaded = replace(loaded, corpora=(read_corpus(loaded.tokenizer, corpus, on_progress, on_problem),))
    loaded = prepare(loaded, engine=engine, on_compile=on_compile, on_eager=on_eager)
    release_threads()  # answers may be asked for by another thread
    return Model(loaded, template=template, cache_bytes=cache_bytes)
