"""Peers that need more than the model: a draft model, or llama.cpp."""

import copy
import json
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from tiny import tiny_model
from transformers import GenerationConfig

from space_cli.bench import llama_cpp
from space_cli.bench.measure import measure
from space_cli.bench.methods import METHODS, choose_methods, methods_named
from space_cli.core.sampling import Sampling
from space_cli.errors import RunFailed, UsageProblem
from space_cli.models.loading import load_model
from space_cli.tasks.plan import Settings, plan
from space_cli.tasks.prompts import Prompt, Suite
from space_cli.tasks.suites import load_suite

SUITE = Suite(
    "small", tuple(Prompt(f"small/{n}", (text,)) for n, text in enumerate(["def add(a", "for x in", "print("]))
)


class Unwatched:
    def started(self, suite, task_id, method):
        pass

    def stepped(self, method, step):
        pass

    def finished(self, method):
        pass


@pytest.fixture(scope="module")
def loaded(tiny_model_dir):
    return load_model(str(tiny_model_dir), dtype="float32")


@pytest.fixture(scope="module")
def draft(tiny_model_dir):
    return load_model(str(tiny_model_dir), dtype="float32")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "space" / "gguf"


@pytest.fixture
def _llama_cpp():
    pytest.importorskip("llama_cpp")


def run(loaded, names, *, draft=None, suite=SUITE, sampling=None, tokens=20):
    sampling = sampling or Sampling()
    methods, _ = choose_methods(methods_named(names), loaded, sampling=sampling, draft=draft)
    planned = plan(loaded, [suite], Settings(tokens, sampling), draft=draft)
    by_prompt = measure(planned.prompts, methods, Unwatched())
    return [sample for samples in by_prompt for sample in samples if sample.method != "ar"]


def llama(loaded, **changes):
    """A tiny Llama of another config, its biases and norms random too."""
    model = tiny_model("llama", **changes)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.2
    return replace(loaded, model=model)


def test_a_model_assisted_by_itself_answers_as_ar_does_in_fewer_steps(loaded, draft):
    samples = run(loaded, ["ar", "hf-assisted"], draft=draft)

    assert all(sample.identical for sample in samples)
    assert all(sample.steps < sample.tokens for sample in samples)


def test_assisted_answers_can_be_sampled(loaded, draft):
    samples = run(loaded, ["ar", "hf-assisted"], draft=draft, sampling=Sampling(0.8, top_k=20, seed=1))

    assert [sample.identical for sample in samples] == [None] * 3


def test_generation_defaults_of_a_draft_model_do_not_reach_generate(loaded, draft, monkeypatch):
    steps = [sample.steps for sample in run(loaded, ["ar", "hf-assisted"], draft=draft)]
    own = GenerationConfig(do_sample=True, temperature=5.0, num_assistant_tokens=1, no_repeat_ngram_size=1)
    monkeypatch.setattr(draft.model, "generation_config", own)

    samples = run(loaded, ["ar", "hf-assisted"], draft=draft)

    assert all(sample.identical for sample in samples)
    assert [sample.steps for sample in samples] == steps
    assert draft.model.generation_config is own


def test_a_draft_model_must_be_there_and_know_the_same_tokens(loaded):
    nano = load_model("nano", dtype="float32")

    with pytest.raises(UsageProblem, match="drafts with a smaller model; name one with --draft-model"):
        choose_methods([METHODS["hf-assisted"]], loaded, sampling=Sampling())
    with pytest.raises(UsageProblem, match="--draft-model nano: its vocabulary is not that of"):
        choose_methods([METHODS["hf-assisted"]], loaded, sampling=Sampling(), draft=nano)


def test_a_draft_model_has_as_many_rows_but_needs_no_masks(loaded, draft):
    padded = llama(draft, vocab_size=320)
    untrained = replace(draft, mask_token_ids=())
    without = replace(untrained, tokenizer=copy.deepcopy(draft.tokenizer))
    without.tokenizer.get_vocab = lambda: {
        token: id_ for token, id_ in loaded.tokenizer.get_vocab().items() if id_ not in loaded.mask_token_ids
    }

    assert choose_methods([METHODS["hf-assisted"]], loaded, sampling=Sampling(), draft=untrained)
    assert choose_methods([METHODS["hf-assisted"]], loaded, sampling=Sampling(), draft=without)
    with pytest.raises(UsageProblem, match="its vocabulary is not that of"):
        choose_methods([METHODS["hf-assisted"]], loaded, sampling=Sampling(), draft=padded)


def test_a_draft_model_is_named_on_the_command_line_and_in_the_record(run_space, tiny_model_dir, prompts_file):
    common = ("bench", "--model", tiny_model_dir, "--suite", prompts_file, "--max-new-tokens", 12, "--engine", "eager")
    common = (*common, "--dtype", "float32", "--quiet", "--draft-model", tiny_model_dir)

    done = run_space(*common, "--methods", "ar,hf-assisted", "--json", "-")
    idle = run_space(*common, "--methods", "ar,hf")

    record = json.loads(done.stdout)
    assert record["settings"]["draft_model"] == str(tiny_model_dir)
    assert [row["identical"] for row in record["results"] if row["method"] == "hf-assisted"] == [True]
    assert idle.returncode == 2
    assert idle.stderr.splitlines() == [
        "space: --draft-model: none of the methods drafts with it; add hf-assisted to --methods"
    ]


def test_the_list_names_all_methods(run_space):
    lines = run_space("bench", "--list").stdout.splitlines()

    assert "  hf-assisted  generate with the draft model of --draft-model" in lines
    assert any(line.startswith("  llama-cpp    llama.cpp, greedy, on the same weights") for line in lines)


LLAMAS = {
    "grouped heads": {},
    "tied embeddings": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 16},
    "linear positions": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "Llama 3 positions": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
}


@pytest.mark.usefixtures("_llama_cpp", "cache")
@pytest.mark.parametrize("changes", LLAMAS.values(), ids=LLAMAS)
def test_llama_cpp_answers_as_ar_does(loaded, changes):
    samples = run(llama(loaded, **changes), ["ar", "llama-cpp"], tokens=60)

    assert all(sample.identical for sample in samples)
    assert all(sample.tokens_by_step == [1] * sample.tokens for sample in samples)


@pytest.mark.usefixtures("_llama_cpp", "cache")
def test_llama_cpp_answers_as_nano_does():
    nano, suite = load_model("nano", dtype="float32"), load_suite("humaneval")

    samples = run(nano, ["ar", "llama-cpp"], suite=replace(suite, prompts=suite.prompts[:3]), tokens=100)

    assert sum(sample.identical for sample in samples) >= 2


@pytest.mark.usefixtures("_llama_cpp", "cache")
def test_llama_cpp_runs_bfloat16_weights_and_ends_at_stop_strings(tiny_model_dir):
    half = load_model(str(tiny_model_dir), dtype="bfloat16")
    text = run(half, ["llama-cpp"])[0].text

    sample = run(half, ["llama-cpp"], suite=replace(SUITE, stop_strings=(text[4:6],)))[0]

    assert sample.finish_reason == "stop_string"
    assert text.startswith(sample.text)


@pytest.mark.usefixtures("_llama_cpp", "cache")
def test_llama_cpp_is_loaded_again_where_an_answer_needs_more_room(loaded, monkeypatch):
    monkeypatch.setattr(llama_cpp, "_MIN_CONTEXT", 16)
    other = llama(loaded)
    suite = replace(SUITE, prompts=(*SUITE.prompts, Prompt("small/long", ("def add(a, b):\n" * 12,))))

    samples = run(other, ["ar", "llama-cpp"], suite=suite, tokens=10)

    assert all(sample.identical for sample in samples)


@pytest.mark.usefixtures("_llama_cpp")
def test_the_file_for_llama_cpp_is_written_once_and_whole(loaded, cache, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(llama_cpp, "convert", full)
        with pytest.raises(RunFailed, match=r"\.gguf: could not be written: No space left on device"):
            run(llama(loaded), ["llama-cpp"])
    assert not list(cache.iterdir())
    run(llama(loaded), ["llama-cpp"])
    (written,) = cache.iterdir()
    monkeypatch.setattr(llama_cpp, "convert", full)
    run(llama(loaded), ["llama-cpp"])

    assert [*cache.iterdir()] == [written]


@pytest.mark.usefixtures("_llama_cpp")
def test_llama_cpp_runs_the_weights_of_a_tuned_model_and_not_those_of_its_base(loaded, cache):
    base, tuned = llama(loaded), llama(loaded)
    with torch.no_grad():
        tuned.model.lm_head.weight.neg_()

    samples = [run(each, ["ar", "llama-cpp"]) for each in (base, tuned)]

    assert all(sample.identical for each in samples for sample in each)
    assert len([*cache.iterdir()]) == 2


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("name", ["hf", "hf-lookup", "llama-cpp"])
@pytest.mark.parametrize("penalty", [{"presence_penalty": 1.5}, {"frequency_penalty": 0.7}])
def test_peers_penalise_what_the_answer_has_as_ar_does(loaded, name, penalty):
    if name == "llama-cpp":
        pytest.importorskip("llama_cpp")
    model = llama(loaded)

    plain = run(model, ["ar", name], tokens=80)
    penalised = run(model, ["ar", name], tokens=80, sampling=Sampling(**penalty))

    assert all(sample.identical for sample in plain + penalised)
    assert [sample.token_ids for sample in penalised] != [sample.token_ids for sample in plain]


@pytest.mark.usefixtures("_llama_cpp")
def test_what_llama_cpp_cannot_run_is_reported(loaded, tiny_models):
    yarn = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}}
    refused = {
        "it is a Qwen2ForCausalLM, and LlamaForCausalLM alone can be converted": tiny_models["qwen2"],
        "its activation is gelu": llama(loaded, hidden_act="gelu").model,
        "its rotary positions are scaled by yarn": llama(loaded, **yarn).model,
        "its dtype is float16": llama(loaded).model.half(),
    }

    for reason, model in refused.items():
        with pytest.raises(UsageProblem, match=f"method 'llama-cpp' cannot run .*: {reason}; leave it out"):
            choose_methods([METHODS["llama-cpp"]], replace(loaded, model=model), sampling=Sampling())
    for sampling in (Sampling(0.5), Sampling(repetition_penalty=1.2)):
        with pytest.raises(UsageProblem, match="method 'llama-cpp' is greedy, without repetition penalty"):
            choose_methods([METHODS["llama-cpp"]], loaded, sampling=sampling)


def test_without_its_package_llama_cpp_says_what_to_install(loaded, monkeypatch):
    monkeypatch.setattr(llama_cpp, "find_spec", lambda name: None if name == "llama_cpp" else find_spec("json"))

    with pytest.raises(UsageProblem, match="needs another package; pip install llama-cpp-python"):
        choose_methods([METHODS["llama-cpp"]], loaded, sampling=Sampling())
