"""Methods that answer a prompt: our AR baseline, SPACE, and peers that run the same model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from space_cli.bench import llama_cpp
from space_cli.bench.sweep import sweep_method
from space_cli.core.drafting import Strategy
from space_cli.core.engine import embedding_rows
from space_cli.core.sampling import Sampling
from space_cli.core.stream import Generation, Step
from space_cli.errors import UsageProblem, did_you_mean
from space_cli.models.loading import LoadedModel
from space_cli.tasks.task import OnStep, Task, run_decode, run_generate

LOOKUP_TOKENS = 10
"""`prompt_lookup_num_tokens` as transformers' documentation has it."""


def _ar(task: Task, on_step: OnStep) -> Generation:
    return run_decode(task, None, on_step)


def _space(task: Task, on_step: OnStep) -> Generation:
    return run_decode(task, task.loaded.drafts(task.candidates, strategy=Strategy(memory=False)), on_step)


def _space_chain(task: Task, on_step: OnStep) -> Generation:
    return run_decode(task, task.loaded.drafts(task.candidates or task.loaded.candidates), on_step)


def _hf(task: Task, on_step: OnStep) -> Generation:
    return run_generate(task, on_step)


def _hf_lookup(task: Task, on_step: OnStep) -> Generation:
    return run_generate(task, on_step, prompt_lookup_num_tokens=LOOKUP_TOKENS)


def _hf_assisted(task: Task, on_step: OnStep) -> Generation:
    assert task.draft is not None
    return run_generate(task, on_step, assistant_model=task.draft.model)


def _hf_early_exit(task: Task, on_step: OnStep) -> Generation:
    return run_generate(task, on_step, assistant_early_exit=_exit_layer(task.loaded.model))


def _hf_mtp(task: Task, on_step: OnStep) -> Generation:
    return run_generate(task, on_step, use_mtp=True)


def _llama_cpp(task: Task, on_step: OnStep) -> Generation:
    generation, state = Generation(), task.stop.begin(task.prompt_ids)
    tokens = llama_cpp.greedy(task.loaded, task.prompt_ids, task.sampling, max_new_tokens=task.stop.max_new_tokens)
    while generation.finish_reason is None:
        started = time.perf_counter()
        token = next(tokens)
        reason = state.push(token)
        step = Step((token,), 0, (), (), slots=1, seconds=time.perf_counter() - started, finish_reason=reason)
        generation.steps.append(step)
        on_step(step)
    return generation


@dataclass(frozen=True, slots=True)
class Method:
    """A way to answer a prompt.

    Attributes:
        exact_under_seed: sampled output is token-identical to AR's under the same seed.
        needs_masks: the model must have been trained for SPACE.
        takes_candidates: --candidates fixes its k, where the model has masks.
        adaptive: draws blocks by the measured costs of steps.
        check: raises UsageProblem where it cannot run this model under this sampling, with this draft model or none.
    """

    name: str
    description: str
    run: Callable[[Task, OnStep], Generation]
    exact_under_seed: bool
    needs_masks: bool = False
    takes_candidates: bool = False
    adaptive: bool = False
    check: Callable[[LoadedModel, Sampling, LoadedModel | None], None] | None = None


def _check_draft(loaded: LoadedModel, _sampling: Sampling, draft: LoadedModel | None) -> None:
    if draft is None:
        raise UsageProblem("method 'hf-assisted' drafts with a smaller model", hint="name one with --draft-model")
    # mask tokens do not occur in text, so either tokenizer may lack them
    masks = {*loaded.mask_token_ids, *draft.mask_token_ids}
    differing = {id_ for _, id_ in loaded.tokenizer.get_vocab().items() ^ draft.tokenizer.get_vocab().items()}
    # generate takes another number of rows for another tokenizer
    if differing - masks or embedding_rows(loaded.model) != embedding_rows(draft.model):
        raise UsageProblem(
            f"--draft-model {draft.name}: its vocabulary is not that of {loaded.name}",
            hint="give a smaller model of the same family",
        )


def _check_llama_cpp(loaded: LoadedModel, sampling: Sampling, _draft: LoadedModel | None) -> None:
    llama_cpp.check(loaded, sampling)


def _exit_layer(model: PreTrainedModel) -> int:
    """Return the layer at which drafting exits: a quarter of the layers, as published (LayerSkip, arXiv 2404.16710)."""
    return max(1, int(model.config.get_text_config().num_hidden_layers) // 4)


@torch.inference_mode()
def _check_early_exit(loaded: LoadedModel, _sampling: Sampling, _draft: LoadedModel | None) -> None:
    """Check that the model's code exits early when its config says so; generate relies on nothing else."""
    model = loaded.model
    config = getattr(getattr(model, model.base_model_prefix, None), "config", None)
    layers = getattr(config, "num_hidden_layers", None)
    if config is None or layers is None or layers < 2:
        raise UsageProblem(f"{loaded.name} has no layers to leave out")
    probe = torch.tensor([[1, 2, 3]], device=model.device)
    try:
        whole = model(probe, use_cache=False).logits
        config.num_hidden_layers = _exit_layer(model)
        part = model(probe, use_cache=False).logits
    finally:
        config.num_hidden_layers = layers
    if torch.equal(whole, part):
        raise UsageProblem(f"{type(model).__name__} always runs all of its layers")


def _check_tie(loaded: LoadedModel, _sampling: Sampling, _draft: LoadedModel | None) -> None:
    if loaded.bigram is None:
        raise UsageProblem(f"{loaded.name}: its masks are not tied: space is the same")


def _check_mtp(loaded: LoadedModel, _sampling: Sampling, _draft: LoadedModel | None) -> None:
    if not getattr(loaded.model.config.get_text_config(), "num_mtp_layers", None):
        raise UsageProblem(f"{loaded.name} has no layers for multi-token prediction")


def _part(name: str, description: str, strategy: Strategy) -> Method:
    """Return SPACE with some of its draft sources only, for the ablation."""

    def run(task: Task, on_step: OnStep) -> Generation:
        generation = run_decode(task, task.loaded.drafts(strategy=strategy), on_step)
        if strategy.memory:
            task.loaded.remember(generation.tokens)
        return generation

    return Method(
        name,
        description,
        run,
        exact_under_seed=True,
        needs_masks=not (strategy.copies and strategy.tie),
        adaptive=True,
        check=None if strategy.tie else _check_tie,
    )


METHODS = {
    method.name: method
    for method in (
        Method("ar", "one token per model call, our baseline", _ar, exact_under_seed=True),
        Method(
            "space",
            "auto-correct decoding; without masks, candidates copied from the context",
            _space,
            exact_under_seed=True,
            takes_candidates=True,
            adaptive=True,
        ),
        Method(
            "space-chain",
            "the same in the paper's block",
            _space_chain,
            exact_under_seed=True,
            needs_masks=True,
            takes_candidates=True,
        ),
        _part("space-masks", "blocks by cost, one token of each mask", Strategy(1, copies=False, memory=False)),
        _part("space-tree", "blocks by cost, several tokens of each mask", Strategy(copies=False, memory=False)),
        _part("space-untied", "space, each mask guessing by itself", Strategy(tie=False, memory=False)),
        _part("space-lookup", "candidates copied from the context, no masks", Strategy(0, memory=False)),
        _part("space-memory", "space, with the answers of this run to copy from", Strategy()),
        Method("hf", "transformers' generate", _hf, exact_under_seed=False),
        Method("hf-lookup", "generate with prompt lookup", _hf_lookup, exact_under_seed=False),
        Method(
            "hf-assisted",
            "generate with the draft model of --draft-model",
            _hf_assisted,
            exact_under_seed=False,
            check=_check_draft,
        ),
        Method(
            "hf-early-exit",
            "generate drafting with its first layers (LayerSkip)",
            _hf_early_exit,
            exact_under_seed=False,
            check=_check_early_exit,
        ),
        Method(
            "hf-mtp",
            "generate drafting with the model's layers for multi-token prediction",
            _hf_mtp,
            exact_under_seed=False,
            check=_check_mtp,
        ),
        Method(
            "llama-cpp",
            "llama.cpp, greedy, on the same weights: the GGUF file itself (pip install llama-cpp-python)",
            _llama_cpp,
            exact_under_seed=False,
            check=_check_llama_cpp,
        ),
    )
}


def choose_methods(
    methods: Sequence[Method], loaded: LoadedModel, *, sampling: Sampling, draft: LoadedModel | None = None
) -> tuple[list[Method], dict[str, str]]:
    """Return the methods that can run this model under this sampling, and for each other one the reason.

    Raises:
        UsageProblem: none can; says why the first cannot.
    """
    chosen, problems = [], dict[str, UsageProblem]()
    for method in methods:
        try:
            _check(method, loaded, sampling, draft)
        except UsageProblem as problem:
            problems[method.name] = problem
        else:
            chosen.append(method)
    if not chosen:
        raise next(iter(problems.values()))
    return chosen, {name: str(problem) for name, problem in problems.items()}


def _check(method: Method, loaded: LoadedModel, sampling: Sampling, draft: LoadedModel | None) -> None:
    if method.needs_masks and not loaded.candidates:
        raise UsageProblem(
            f"{loaded.name} has no masks, so method {method.name!r} cannot run on it",
            hint="method space drafts without; or give mask_token_ids and candidates in a models file",
        )
    if method.check is not None:
        method.check(loaded, sampling, draft)


def chains(sizes: Sequence[int]) -> list[Method]:
    """Return AR and one method per k, all with the paper's block, to find the fastest k on this machine."""
    return [METHODS["ar"], *[_chain(k) for k in sizes]]


def _chain(k: int) -> Method:
    return Method(
        sweep_method(k),
        f"the paper's block with k = {k}",
        lambda task, on_step: run_decode(task, task.loaded.drafts(k), on_step),
        exact_under_seed=True,
        needs_masks=True,
        check=lambda loaded, _sampling, _draft: _check_k(loaded, k),
    )


def _check_k(loaded: LoadedModel, k: int) -> None:
    if k > loaded.masks_per_group:
        raise UsageProblem(f"{loaded.name} was trained for k up to {loaded.masks_per_group}")


def methods_named(names: Sequence[str]) -> list[Method]:
    """Return the methods named, each once, whatever the model; "all" names every one.

    Raises:
        UsageProblem: an unknown method.
    """
    if "all" in names:
        names = list(METHODS)
    for name in names:
        if name not in METHODS:
            hint = did_you_mean(name, METHODS, otherwise=f"methods: {', '.join(METHODS)}; or all")
            raise UsageProblem(f"no method named {name!r}", hint=hint)
    return [METHODS[name] for name in dict.fromkeys(names)]
