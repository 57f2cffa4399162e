"""Loading a model by alias, folder or Hub id, in the dtype and on the device asked for, ready for decoding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file

from space_cli.chat.templates import encode
from space_cli.core.block import Block
from space_cli.core.costs import ASSUMED_COSTS, StepCosts
from space_cli.core.drafting import (
    EVERYTHING,
    AcceptanceStats,
    AdaptiveDrafter,
    Bigram,
    ChainDrafter,
    Drafter,
    Guide,
    Strategy,
)
from space_cli.core.drafting.ngrams import Source
from space_cli.core.engine import Compiled, context_length, embedding_rows
from space_cli.core.quantized import dequantize, num_parameters
from space_cli.errors import UsageProblem, first_line
from space_cli.models import support
from space_cli.models.checkpoint import ADAPTER_FILES, SPACE_CONFIG_NAME, SpaceConfig
from space_cli.models.gguf_names import gguf_path, is_gguf
from space_cli.models.kernels import kernels_problem
from space_cli.models.quantization import PACKED, bitsandbytes_arguments, check_packing, pack_layers
from space_cli.models.registry import ModelEntry, read_models, resolve
from space_cli.models.stops import stop_ids
from space_cli.models.texts import PastAnswers

Weights = Literal["as stored", "dense"]
SPREAD = "cuda:all"
"""The device of a model whose layers are laid over all GPUs, as one GPU has no room for it."""
_OVER_ALL: str | dict[str, str] = "auto"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoadedModel:
    """A model with everything that decoding needs.

    Attributes:
        name: as the user gave it.
        source: the folder, file or Hub id it came from.
        eos_token_ids: every id that ends an answer.
        mask_token_ids: one shared id or one per mask; empty for a model never trained for SPACE.
        candidates: k to decode with by default; 0 for a model never trained for SPACE.
        masks_per_group: m of the training, the largest k that makes sense.
        compiled: the compiled model, or None where transformers runs it; costs: of its steps (see `models.engines`).
        completes: it is a base model, which goes on with a text, whatever its chat template.
        gguf: the file its weights came from, the first of several shards; None for a folder of safetensors.
        quantization: of its weights when they were loaded, `none` where they are as stored.
        bigram: ties the masks' guesses; None where none was trained.
        corpora: texts to copy from.
        past: answers of before to copy from, to which new ones are added; None where they are not wanted.
        stats: of its drafts by their strategy, from answer to answer.
    """

    name: str
    source: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    space: SpaceConfig | None
    dtype: str
    device: str
    context_length: int | None
    eos_token_ids: frozenset[int]
    mask_token_ids: tuple[int, ...]
    candidates: int
    masks_per_group: int
    prompt_template: str | None
    compiled: Compiled | None = None
    costs: StepCosts = ASSUMED_COSTS
    completes: bool = False
    gguf: Path | None = None
    quantization: str = "none"
    bigram: Bigram | None = None
    corpora: tuple[Source, ...] = ()
    past: PastAnswers | None = None
    stats: dict[Strategy, AcceptanceStats] = field(default_factory=dict)

    @property
    def is_chat_model(self) -> bool:
        """Whether it is a chat model rather than a base model."""
        return bool(self.tokenizer.chat_template) and not self.completes

    def drafts(
        self,
        candidates: int | None = None,
        *,
        strategy: Strategy = EVERYTHING,
        texts: Iterable[Sequence[int]] = (),
        guide: Guide | None = None,
    ) -> Drafter:
        """Return a drafter: the chain of `candidates`, or adaptive blocks by measured costs.

        A model without masks drafts what it copies.

        Args:
            candidates: k of the paper's chain.
            strategy: what drafts are made of where `candidates` is None.
            texts: token ids to copy from besides the context, as an answer that is expected.
            guide: of a grammar that the answer follows.
        """
        if candidates is not None:
            return ChainDrafter(Block.chain(candidates, candidates), bigram=self.bigram)
        if strategy not in self.stats:
            accepted = () if self.space is None else self.space.accepted_by_depth
            self.stats[strategy] = AcceptanceStats(self.costs, self.masks_per_group, accepted)
        return AdaptiveDrafter(
            self.stats[strategy],
            self.masks_per_group,
            strategy,
            bigram=self.bigram,
            texts=texts,
            sources=self.sources(strategy),
            guide=guide,
        )

    def sources(self, strategy: Strategy = EVERYTHING) -> list[Source]:
        """Return the texts outside the context that drafts are copied from."""
        return [self.past, *self.corpora] if strategy.memory and self.past is not None else list(self.corpora)

    def remember(self, answer: Sequence[int]) -> None:
        """Add an answer to the texts that later drafts are copied from."""
        if self.past is not None:
            self.past.add(answer)

    @property
    def num_parameters(self) -> int:
        """Number of weights, those that are quantised included."""
        return num_parameters(self.model)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text` with the special tokens the tokenizer puts in front, and none behind."""
        return encode(text, self.tokenizer)

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of `token_ids`."""
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens))


def load_model(
    name: str,
    *,
    models_file: Path | None = None,
    dtype: str = "auto",
    device: str = "auto",
    quantization: str = "none",
    revision: str | None = None,
    weights: Weights = "as stored",
) -> LoadedModel:
    """Load a model and refuse one that SPACE cannot run.

    Args:
        name: an alias of models.toml, a folder, a GGUF file, or a Hub id.
        models_file: a user's own models.toml.
        dtype: auto, float32, bfloat16 or float16; auto is the checkpoint's own where the device computes in it.
        device: auto, cpu, cuda, cuda:N, mps, or cuda:all: layer by layer over all GPUs.
        quantization: none; q8_0 or q4_0, as GGUF files have them, on a CPU; int8, nf4 or fp4 (bitsandbytes).
        revision: branch, tag or commit of a Hub id.
        weights: those of a GGUF file stay in its few bits as stored, or become tensors that can be trained through.

    Raises:
        UsageProblem: no such model, a malformed folder, or a model that cannot work; one line each.
    """
    entry = resolve(name, models_file)
    revision = revision or entry.revision
    chosen_device = _device(device)
    try:
        space = _space_config(entry, revision)
        base, base_revision = _base(entry, revision, space, models_file)
        file = gguf_path(base, base_revision) if is_gguf(base) else None
        asked = {"dtype": dtype, "device": chosen_device, "quantization": quantization}
        if file is None:
            model, tokenizer = _from_folder(name, base, base_revision, **asked, weights=weights)
        else:
            model, tokenizer = _from_gguf(name, file, **asked, weights=weights)
    except (OSError, ValueError) as error:
        raise _not_loaded(name, entry, error) from error
    if quantization == "none" and chosen_device != SPREAD:
        model.to(torch.device(chosen_device))  # type: ignore[arg-type]  # wrapped in a way that hides its signature
    bigram = None
    if space is not None and space.method == "adapter":
        bigram = _put_adapter_on(model, entry, revision, space)
    model.eval()
    support.check_block(model, name)
    return LoadedModel(
        name=name,
        source=str(entry.source),
        model=model,
        tokenizer=tokenizer,
        space=space,
        dtype=str(model.dtype).removeprefix("torch."),
        device=chosen_device,
        context_length=context_length(model.config),
        eos_token_ids=stop_ids(tokenizer, model.generation_config),
        prompt_template=entry.prompt_template,
        completes=entry.completes or _base_completes(space, models_file),
        gguf=file,
        quantization=quantization,
        bigram=bigram,
        **_mask_fields(name, model, space, entry),
    )


def _from_folder(
    name: str, source: str, revision: str | None, *, dtype: str, device: str, quantization: str, weights: Weights
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return model and tokenizer of a folder, or of a Hub id."""
    if Path(source).is_dir() and not Path(source, "config.json").is_file():
        raise UsageProblem(f"{name}: not a complete model folder: no config.json in {source}")
    config = AutoConfig.from_pretrained(source, revision=revision)
    support.check_config(config, name)
    chosen = DTYPES[_dtype(dtype, device, config)]
    if quantization in PACKED:
        check_packing(name, config, quantization, device=device, dtype="auto" if weights == "dense" else dtype)
        placed: dict[str, Any] = {"dtype": DTYPES.get(_own_dtype(config), torch.float32)}
    else:
        placed = {"dtype": chosen, **_placement(quantization, device), **bitsandbytes_arguments(quantization, chosen)}
    tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    model = AutoModelForCausalLM.from_pretrained(
        source, revision=revision, config=config, use_safetensors=True, **placed
    )
    if quantization in PACKED:
        pack_layers(model, quantization, name)
        if weights == "dense":
            dequantize(model)
            model.to(chosen)  # type: ignore[arg-type]  # wrapped in a way that hides its signature
    return model, tokenizer


def _from_gguf(
    name: str, source: Path, *, dtype: str, device: str, quantization: str, weights: Weights
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return model and tokenizer of a GGUF file."""
    from space_cli.models.gguf import gguf_config, gguf_dtype, gguf_model
    from space_cli.models.gguf_file import read_gguf
    from space_cli.models.gguf_tokenizer import gguf_tokenizer

    if quantization != "none":
        raise UsageProblem(f"{name} is a GGUF file, quantised as it is", hint="leave --quantization out")
    gguf = read_gguf(source)
    config = gguf_config(gguf)
    support.check_config(config, name)
    config.dtype = DTYPES[gguf_dtype(gguf)]
    tokenizer = gguf_tokenizer(gguf.metadata, str(source))
    chosen = DTYPES[_dtype(dtype, device, config)]
    packed = weights == "as stored" and device == "cpu" and chosen == torch.float32 and gguf.is_quantized
    return gguf_model(gguf, config, chosen, packed=packed and kernels_problem() is None), tokenizer


def _device(device: str) -> str:
    """Resolve `auto`, or check the given device."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind = device.partition(":")[0]
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if kind not in present:
        raise UsageProblem(f"unknown device {device!r}", hint="use auto, cpu, cuda, cuda:N, cuda:all or mps")
    if not present[kind]:
        raise UsageProblem(f"no {kind} device on this machine", hint="use --device cpu")
    return device


def computes_in_bfloat16() -> bool:
    """Return whether this CPU has instructions for products of bfloat16."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _dtype(dtype: str, device: str, config: PretrainedConfig) -> str:
    """Return the dtype `auto` stands for: the checkpoint's own, float32 on a CPU without bfloat16 instructions."""
    if dtype != "auto":
        if dtype not in DTYPES:
            raise UsageProblem(f"unknown dtype {dtype!r}", hint=f"use auto, {', '.join(DTYPES)}")
        return dtype
    own = _own_dtype(config)
    if device == "cpu" and own != "float32":
        return "bfloat16" if computes_in_bfloat16() else "float32"
    return own if own in DTYPES else "float32"


def _own_dtype(config: PretrainedConfig) -> str:
    """Return the dtype of a checkpoint by its config."""
    return str(config.get_text_config().dtype or config.dtype or "float32").removeprefix("torch.")


def _placement(quantization: str, device: str) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that place weights on devices."""
    if device == SPREAD:
        return {"device_map": _OVER_ALL}
    return {} if quantization == "none" else {"device_map": {"": device}}


def _space_config(entry: ModelEntry, revision: str | None) -> SpaceConfig | None:
    """Return space_config.json of the folder or Hub id, or None where it has none."""
    if is_gguf(entry.checkpoint):
        return None
    found = cached_file(
        entry.checkpoint,
        SPACE_CONFIG_NAME,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return SpaceConfig.load(Path(found).parent) if found else None


def _base(
    entry: ModelEntry, revision: str | None, space: SpaceConfig | None, models_file: Path | None
) -> tuple[str, str | None]:
    """Return where the model's weights are, and their revision: an adapter names its base."""
    if space is None or space.method != "adapter":
        return entry.source, revision
    if space.base_model is None:
        raise UsageProblem(f"{entry.source}: {SPACE_CONFIG_NAME}: an adapter must name its base_model")
    if entry.checkpoint != entry.source:
        return entry.source, revision
    base = resolve(space.base_model, models_file)
    return base.source, space.base_revision or base.revision


def _base_completes(space: SpaceConfig | None, models_file: Path | None) -> bool:
    """Return whether the tuned model is a base model, according to models.toml."""
    known = read_models(models_file)
    return space is not None and space.base_model in known and known[space.base_model].completes


def _put_adapter_on(
    model: PreTrainedModel, entry: ModelEntry, revision: str | None, space: SpaceConfig
) -> Bigram | None:
    """Load an adapter, from the Hub if needed, onto its base model; return the bigram that it has."""
    from space_cli.models.adapter import bigram_of, load_adapter  # peft takes half a second to import

    files = [cached_file(entry.checkpoint, name, revision=revision) for name in ADAPTER_FILES]
    load_adapter(model, Path(str(files[-1])).parent, masks=len(space.mask_token_ids))
    return bigram_of(model)


def _mask_fields(name: str, model: PreTrainedModel, space: SpaceConfig | None, entry: ModelEntry) -> dict[str, Any]:
    """Return the mask fields of space_config.json or models.toml, checked against the embeddings."""
    known = space or entry
    ids = tuple(known.mask_token_ids or ())
    rows = embedding_rows(model)
    if any(not 0 <= token < rows for token in ids):
        raise UsageProblem(f"{name}: mask_token_ids {list(ids)} lie outside its {rows} embedding rows")
    candidates = (known.candidates or 0) if ids else 0
    return {
        "mask_token_ids": ids,
        "candidates": candidates,
        "masks_per_group": (known.masks_per_group or candidates) if ids else 0,
    }


def _not_loaded(name: str, entry: ModelEntry, error: OSError | ValueError) -> UsageProblem:
    if not isinstance(error, OSError):
        return _unreadable(name, error)
    if Path(entry.source).is_dir():
        return UsageProblem(f"{name}: not a complete model folder: {first_line(error)}")
    return UsageProblem(
        f"model {name!r} could not be loaded: {first_line(error)}",
        hint="give an alias of models.toml, a folder, a GGUF file (on the Hub: org/repo:Q4_K_M), or the id of a model",
    )


def _unreadable(name: str, error: ValueError) -> UsageProblem:
    if "trust_remote_code" in str(error):
        return UsageProblem(
            f"{name} needs code of its own, which space never runs", hint="choose a model that transformers has"
        )
    return UsageProblem(f"{name} could not be loaded: {first_line(error)}")


def unpack(model: PreTrainedModel) -> None:
    """Make a quantised model on a CPU trainable again after inference.

    bitsandbytes packs 4-bit weights at the first call in evaluation mode, and nothing can be learned through them then;
    reading the state unpacks them.
    """
    if getattr(model, "is_quantized", False):
        model.state_dict()
