from dataclasses import replace

import pytest
from transformers import GenerationConfig

import space_cli
from space_cli.bench.measure import Settings, measure
from space_cli.bench.methods import METHODS, Method, choose_methods, methods_named
from space_cli.bench.report import Report, Sample, environment, results
from space_cli.bench.suites import Prompt, Suite
from space_cli.core.choose import Sampling
from space_cli.core.stream import Generation, Step
from space_cli.errors import UsageProblem
from space_cli.models.loading import load_model

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


def run(loaded, names, *, suites=(SUITE,), sampling=None, tokens=20, view=None):
    sampling = sampling or Sampling()
    methods = choose_methods(names, loaded, sampling=sampling)
    return list(measure(loaded, suites, methods, Settings(tokens, sampling), view or Recorder()))


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


def test_a_prompt_that_does_not_fit_is_told_before_anything_runs(loaded):
    view = Recorder()
    suite = replace(SUITE, prompts=(*SUITE.prompts, Prompt("small/long", ("x " * 300,))))

    with pytest.raises(UsageProblem, match=r"small small/long: \d+ prompt tokens and 20 new ones exceed"):
        run(loaded, ["ar"], suites=[suite], view=view)

    assert not view.events


def test_candidates_keep_to_what_was_trained(loaded):
    methods = choose_methods(["space"], loaded, sampling=Sampling())

    for candidates in (0, 4):
        with pytest.raises(UsageProblem, match=f"--candidates {candidates}: .* was trained for 1 to 3"):
            list(measure(loaded, [SUITE], methods, Settings(4, Sampling(), candidates), Recorder()))


def test_unknown_methods_and_untrained_models_are_told(loaded):
    with pytest.raises(UsageProblem, match="no method named 'beam'"):
        choose_methods(["ar", "beam"], loaded, sampling=Sampling())
    with pytest.raises(UsageProblem, match="did you mean hf-lookup"):
        methods_named(["hf-lokup"])
    with pytest.raises(UsageProblem, match="was not trained for SPACE"):
        choose_methods(["space"], replace(loaded, candidates=0), sampling=Sampling())


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


def sample(method, task, tokens, seconds, *, steps=None, repetitive=False):
    return Sample(
        suite="s", task_id=task, method=method, prompt_tokens=1, tokens=tokens, steps=steps or tokens, seconds=seconds,
        first_step_seconds=0.1, token_ids=[], text="", tokens_by_step=[], finish_reason="eos", repetitive=repetitive,
        identical=True,
    )  # fmt: skip


def test_sums_are_total_over_total_and_repetitive_outputs_stand_apart():
    samples = [
        sample("ar", "1", 100, 10.0),
        sample("space", "1", 100, 5.0, steps=50),
        sample("ar", "2", 300, 10.0, repetitive=True),
        sample("space", "2", 300, 1.0, steps=60, repetitive=True),
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
    row = results([sample("space", "1", 100, 5.0)], ["space"])[0]

    assert row.speedup is None


def test_repetitive_is_told_by_distinct_tokens(loaded):
    def looping(*_):
        return Generation([Step((5,), 0, (), (), 1, 0.1)] * 8)

    settings = Settings(8, Sampling())
    found = list(measure(loaded, [SUITE], [Method("loop", "", looping, exact_under_seed=True)], settings, Recorder()))

    assert all(each.repetitive for each in found)
    assert found[0].identical is None


def test_a_checkout_without_git_has_no_commit(loaded, tmp_path, monkeypatch):
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(space_cli, "__file__", str(tmp_path / "space_cli" / "__init__.py"))
    monkeypatch.setenv("PATH", str(tmp_path))

    assert environment(loaded, threads=1)["commit"] is None


def test_report_is_written_whole_or_not_at_all(tmp_path):
    report = Report(environment={}, settings={}, samples=[sample("ar", "1", 3, 1.0)])

    report.write(tmp_path / "run.json")

    assert Report.model_validate_json((tmp_path / "run.json").read_text()) == report
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]
