from copy import copy
from dataclasses import replace

import pytest
from samples import sample
from transformers import GenerationConfig

import space_cli
from space_cli.bench.measure import measure
from space_cli.bench.methods import METHODS, Method, chains, choose_methods, methods_named
from space_cli.bench.record import BenchRecord
from space_cli.bench.results import results
from space_cli.cli.console import write_json
from space_cli.core.sampling import Sampling
from space_cli.core.stream import Generation, Step
from space_cli.errors import UsageProblem
from space_cli.models.loading import load_model
from space_cli.tasks.environment import environment
from space_cli.tasks.plan import Settings, check_candidates, plan, suites_for
from space_cli.tasks.prompts import Prompt, Suite
from space_cli.tasks.suites import load_suite

SUITE = Suite(
    "small", tuple(Prompt(f"small/{n}", (text,)) for n, text in enumerate(["def add(a", "for x in", "print("]))
)


class Recorder:
    def __init__(self):
        self.events = []

    def started(self, suite, task_id, method):
        self.events.append((task_id, method))

    def stepped(self, method, step):
        self.events.append((method, len(step.tokens)))

    def finished(self, method):
        self.events.append((method, "done"))


@pytest.fixture(scope="module")
def loaded(tiny_model_dir):
    return load_model(str(tiny_model_dir), dtype="float32")


def run(loaded, names, *, suites=(SUITE,), sampling=None, tokens=20, view=None, limit=None, seeds=1):
    sampling = sampling or Sampling()
    methods, _ = choose_methods(methods_named(names), loaded, sampling=sampling)
    planned = plan(loaded, suites, Settings(tokens, sampling), limit=limit)
    by_prompt = measure(planned.prompts, methods, view or Recorder(), seeds=seeds)
    return [sample for samples in by_prompt for sample in samples]


def test_all_methods_give_the_same_greedy_answers(loaded):
    samples = run(loaded, ["ar", "space", "hf", "hf-lookup"])

    assert len(samples) == 12
    assert all(sample.identical for sample in samples)
    assert all(len(sample.token_ids) == sample.tokens == sum(sample.tokens_by_step) for sample in samples)


def test_all_methods_end_at_the_same_stop_string(loaded):
    text = run(loaded, ["ar"])[0].text
    suite = replace(SUITE, stop_strings=(text[4:6],))

    samples = run(loaded, ["ar", "space", "hf", "hf-lookup"], suites=[suite])

    assert all(sample.identical for sample in samples)
    assert samples[0].finish_reason == "stop_string"
    assert text[4:6] not in samples[0].text


def test_generation_defaults_of_a_checkpoint_do_not_reach_generate(loaded, monkeypatch):
    own = GenerationConfig(do_sample=True, temperature=5.0, num_beams=2, no_repeat_ngram_size=1, suppress_tokens=[40])
    monkeypatch.setattr(loaded.model, "generation_config", own)

    samples = run(loaded, ["ar", "hf", "hf-lookup"])

    assert all(sample.identical for sample in samples)
    assert loaded.model.generation_config is own


def test_sampled_space_equals_sampled_ar_and_generate_is_not_compared(loaded):
    samples = run(loaded, ["ar", "space", "hf"], sampling=Sampling(0.9, top_k=50, seed=4))

    assert {sample.identical for sample in samples if sample.method != "hf"} == {True}
    assert {sample.identical for sample in samples if sample.method == "hf"} == {None}


def test_methods_take_turns_at_being_first(loaded):
    view = Recorder()

    run(loaded, ["ar", "space"], view=view, tokens=3)

    begun = [event for event in view.events if len(event) == 2 and event[0].startswith("small")]
    assert [method for _, method in begun] == ["ar", "space", "space", "ar", "ar", "space"]


def test_prompts_that_do_not_fit_are_left_out_and_counted_and_others_take_their_place(loaded):
    long = Prompt("small/long", ("x " * 300,))
    suite = replace(SUITE, prompts=(long, *SUITE.prompts))

    planned = plan(loaded, [suite], Settings(20, Sampling()), limit=2)

    assert [each.prompt.task_id for each in planned.prompts] == ["small/0", "small/1"]
    assert planned.left_out["small"].startswith("1 of 3 prompts do not fit, with 20 new tokens")


def test_a_limit_takes_the_first_of_each_category_in_turn(loaded):
    prompts = [Prompt(f"{category}/{n}", ("x",), category) for category in ("qa", "math") for n in range(3)]

    planned = plan(loaded, [Suite("mixed", tuple(prompts))], Settings(4, Sampling()), limit=3)

    assert [each.prompt.task_id for each in planned.prompts] == ["qa/0", "math/0", "qa/1"]


def test_a_suite_of_which_nothing_fits_is_reported_before_anything_runs(loaded):
    suite = replace(SUITE, prompts=(Prompt("small/long", ("x " * 300,)),))

    with pytest.raises(UsageProblem, match="small: 1 of 1 prompts do not fit, with 20 new tokens, into the context"):
        plan(loaded, [SUITE, suite], Settings(20, Sampling()))


def test_later_turns_follow_the_answer_of_ar_and_the_whole_conversation_fits(loaded):
    talk = Suite("talk", (Prompt("talk/1", ("say a word", "and another")),), chat=True)

    first, second = run(loaded, ["ar", "space"], suites=[talk])[::2]

    asked = plan(loaded, [talk], Settings(20, Sampling())).prompts[0]
    following = asked.following(first.token_ids)
    assert (first.turn, second.turn) == (0, 1)
    assert second.prompt_tokens == len(following.task.prompt_ids)
    # the tokens of the answer stand in the next prompt as they were written
    start = len(asked.task.prompt_ids)
    assert following.task.prompt_ids[start : start + first.tokens] == first.token_ids
    assert following.following(second.token_ids) is None
    most = loaded.context_length - (second.prompt_tokens - first.tokens)
    with pytest.raises(UsageProblem, match="talk: 1 of 1 prompts do not fit"):
        plan(loaded, [talk], Settings(most // 2 + 1, Sampling()))


def test_seeds_give_several_answers_to_each_prompt_all_identical_between_methods(loaded):
    samples = run(loaded, ["ar", "space"], sampling=Sampling(0.9, seed=3), seeds=2)

    assert [sample.seed for sample in samples if sample.method == "ar"] == [3, 4] * 3
    assert all(sample.identical for sample in samples)
    assert len({tuple(sample.token_ids) for sample in samples if sample.task_id == "small/0"}) == 2


def test_candidates_keep_to_what_was_trained(loaded):
    for candidates in (0, 4):
        with pytest.raises(UsageProblem, match=f"--candidates {candidates}: .* was trained for 1 to 3"):
            check_candidates(loaded, candidates)


def test_unknown_methods_and_untrained_models_are_reported(loaded):
    with pytest.raises(UsageProblem, match="no method named 'beam'"):
        methods_named(["ar", "beam"])
    with pytest.raises(UsageProblem, match="did you mean hf-lookup"):
        methods_named(["hf-lokup"])
    with pytest.raises(UsageProblem, match="has no masks"):
        choose_methods([METHODS["space-chain"]], replace(loaded, candidates=0), sampling=Sampling())


def test_methods_that_cannot_run_are_left_out_with_a_word(loaded):
    chosen, left_out = choose_methods(methods_named(["all"]), replace(loaded, candidates=0), sampling=Sampling(0.5))

    own, peers = ["ar", "space", "space-lookup", "space-memory"], ["hf", "hf-lookup", "hf-early-exit"]
    assert [method.name for method in chosen] == own + peers
    assert "has no masks" in left_out["space-chain"]
    assert "has no masks" in left_out["space-untied"]
    assert "no layers for multi-token prediction" in left_out["hf-mtp"]
    assert "name one with --draft-model" in left_out["hf-assisted"]


def test_without_a_tie_there_is_nothing_to_untie(loaded):
    _, left_out = choose_methods(methods_named(["all"]), loaded, sampling=Sampling())

    assert left_out["space-untied"] == f"{loaded.name}: its masks are not tied: space is the same"


def test_early_exit_needs_a_model_whose_code_leaves_layers_out(loaded, tiny_models):
    whole = replace(loaded, model=tiny_models["gpt2"])

    assert all(sample.identical for sample in run(loaded, ["ar", "hf-early-exit"]))
    with pytest.raises(UsageProblem, match="always runs all of its layers"):
        choose_methods([METHODS["hf-early-exit"]], whole, sampling=Sampling())


def test_a_sweep_has_a_method_for_each_k_and_leaves_out_what_was_not_trained(loaded):
    chosen, left_out = choose_methods(chains([1, 3, 4]), loaded, sampling=Sampling())
    planned = plan(loaded, [SUITE], Settings(20, Sampling()))

    samples = [each for samples in measure(planned.prompts, chosen, Recorder()) for each in samples]

    assert [method.name for method in chosen] == ["ar", "space-k1", "space-k3"]
    assert left_out == {"space-k4": f"{loaded.name} was trained for k up to 3"}
    assert all(sample.identical for sample in samples)
    assert {max(each.depth_by_step) for each in samples if each.method == "space-k3"} == {3}


def test_a_method_that_answers_differently_is_found(loaded, monkeypatch):
    def liar(task, on_step):
        generation = METHODS["ar"].run(task, on_step)
        last = generation.steps[-1]
        generation.steps[-1] = replace(last, tokens=(last.tokens[0] + 1,))
        return generation

    monkeypatch.setitem(METHODS, "liar", Method("liar", "", liar, exact_under_seed=True))

    rows = results(run(loaded, ["ar", "liar"]), ["ar", "liar"])

    assert [row.identical for row in rows if row.method == "liar"] == [False] * len(rows[1::2])
    assert rows[1].identical_prompts == 0


def test_sums_are_total_over_total_and_repetitive_outputs_stand_apart():
    samples = [
        sample("1", "ar", tokens=100, seconds=10.0),
        sample("1", "space", tokens=100, seconds=5.0, steps=50),
        sample("2", "ar", tokens=300, seconds=10.0, repetitive=True),
        sample("2", "space", tokens=300, seconds=1.0, steps=60, repetitive=True),
    ]

    everything, plain = (
        [row for row in results(samples, ["ar", "space"]) if row.outputs == outputs]
        for outputs in ("all", "without repetitive")
    )

    assert everything[1].tokens_per_second == pytest.approx(400 / 6)
    assert everything[1].speedup == pytest.approx((400 / 6) / 20)
    assert everything[1].tokens_per_step == pytest.approx(400 / 110)
    assert plain[1].prompts == 1
    assert plain[1].speedup == pytest.approx(2.0)
    assert plain[1].tokens_per_step == pytest.approx(2.0)


def test_without_ar_there_is_no_speedup():
    row = results([sample("1", "space")], ["space"])[0]

    assert row.speedup is None


def test_repetitive_is_measured_by_distinct_tokens(loaded):
    def looping(*_):
        return Generation([Step((5,), 0, (), (), 1, 0.1)] * 8)

    planned = plan(loaded, [SUITE], Settings(8, Sampling()))
    loop = [Method("loop", "", looping, exact_under_seed=True)]
    found = [sample for samples in measure(planned.prompts, loop, Recorder()) for sample in samples]

    assert all(each.repetitive for each in found)
    assert found[0].identical is None


def test_a_checkout_without_git_has_no_commit(loaded, tmp_path, monkeypatch):
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(space_cli, "__file__", str(tmp_path / "space_cli" / "__init__.py"))
    monkeypatch.setenv("PATH", str(tmp_path))

    assert environment(loaded)["commit"] is None


def test_report_is_written_whole_or_not_at_all(tmp_path):
    report = BenchRecord(environment={}, settings={}, samples=[sample("1", "ar")])

    write_json(report.to_json, str(tmp_path / "run.json"))

    assert BenchRecord.model_validate_json((tmp_path / "run.json").read_text()) == report
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]


def test_humaneval_is_a_request_to_chat_models_and_a_text_to_go_on_with_to_others(loaded):
    suite = load_suite("humaneval")
    tokenizer = copy(loaded.tokenizer)
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<a>"
    chat_model, base = replace(loaded, tokenizer=tokenizer), replace(loaded, tokenizer=tokenizer, completes=True)

    asked, given, plain = (suites_for(model, [suite])[0] for model in (chat_model, base, loaded))

    assert given == plain == suite
    few = replace(asked, prompts=asked.prompts[:1])
    roomy = replace(chat_model, context_length=None)
    (planned,) = plan(roomy, [few], Settings(8, Sampling())).prompts
    text = roomy.decode(list(planned.task.prompt_ids))
    assert text.startswith("<user>Write a solution to the following problem")
    assert text.endswith("```<a>")
    assert planned.task.stop.stop_strings == ()
