"""The command on tiny models, in this process: what is trained, saved, resumed and measured."""

import json
import shutil
from itertools import takewhile

import pytest
import torch
from safetensors.torch import load_file
from tiny import in_all, tiny_configs, tiny_model

from space_cli.cli.app import run
from space_cli.models.checkpoint import SpaceConfig
from space_cli.training import trainer

FAMILIES = (*tiny_configs(), "Falcon", "Gemma2", "Cohere2", "Olmoe")
FAST = ("--dtype", "float32", "--candidates", "3", "--answer-tokens", "16", "--max-length", "60", "--batch-size", "2")


@pytest.fixture
def data(tmp_path):
    """Prompt and completion pairs."""
    rows = [{"prompt": f"def f{n}(a, b):\n", "completion": f"    return a + {n}\n"} for n in range(40)]
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def make_base(tiny_tokenizer, tmp_path):
    """Save a tiny random model of a family."""

    def make(family="llama"):
        tiny_model(family).save_pretrained(tmp_path / "base")
        tiny_tokenizer.save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    return make


def train(base, data, output, *options):
    return run(["train", "--model", str(base), "--data", str(data), "--output", str(output), *FAST, "-q", *options])


def log(output):
    """What each logged step showed, without the clock."""
    rows = [json.loads(line) for line in (output / "training.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


@pytest.mark.parametrize("method", ["full", "adapter"])
@pytest.mark.parametrize("family", in_all(FAMILIES))
def test_a_family_trains_saves_loads_and_is_lossless(make_base, data, tmp_path, capsys, family, method):
    base, output = make_base(family), tmp_path / "out"

    code = train(base, data, output, "--method", method, "--max-steps", "10", "--distill", "6", "--seed", "3")
    capsys.readouterr()
    options = (
        "--suite",
        str(data),
        "--limit",
        "2",
        "--max-new-tokens",
        "16",
        "--dtype",
        "float32",
        "-q",
        "--json",
        "-",
    )
    checked = run(["verify-lossless", "--model", str(output), *options])

    record = json.loads(capsys.readouterr().out)
    assert code == checked == 0
    assert {row["against"] for row in record["rows"]} >= {"ar", "hf", "drafts"}
    assert ("base" in {row["against"] for row in record["rows"]}) == (method == "adapter")
    config = json.loads((output / "space_config.json").read_text())
    assert config["method"] == method
    assert config["candidates"] == config["masks_per_group"] == len(config["mask_token_ids"]) == 3
    assert config["acceptance"]["after"]["tokens_per_step"] >= 1
    # without masks, and with its text as it was, a base has nothing to measure
    assert ("before" in config["acceptance"]) == (method == "full")
    shares = config["acceptance"]["after"]["accepted_by_depth"]
    assert shares == sorted(shares, reverse=True)
    assert SpaceConfig.load(output).accepted_by_depth == shares
    assert not list(output.glob("*.bin"))


@pytest.mark.parametrize("method", ["full", "adapter"])
def test_training_lowers_the_loss_of_masks(make_base, data, tmp_path, method):
    output = tmp_path / "out"

    # what a random base would say here cannot be foreseen, what the data say can
    options = ("--max-steps", "60", "--learning-rate", "1e-2", "--distill", "off", "--epochs", "9", "--loss", "ce")
    code = train(make_base(), data, output, "--method", method, *options)

    shown = log(output)
    assert code == 0
    assert shown[-1]["mask_loss"] < shown[0]["mask_loss"] - 0.5
    assert shown[-1]["expected_tokens_per_step"] > shown[0]["expected_tokens_per_step"]
    if method == "full":
        assert shown[-1]["ar_loss"] < shown[0]["ar_loss"]


@pytest.mark.parametrize("method", ["full", "adapter"])
def test_a_training_taken_up_again_is_the_training_never_cut_short(make_base, data, tmp_path, monkeypatch, method):
    base, whole, cut = make_base(), tmp_path / "whole", tmp_path / "cut"
    options = (
        "--method",
        method,
        "--max-steps",
        "20",
        "--save-steps",
        "10",
        "--distill",
        "4",
        "--gradient-accumulation",
    )
    assert train(base, data, whole, *options, "2") == 0

    save, seen = trainer.SARTrainer._save_checkpoint, []

    def power_failure(self, *args, **kwargs):
        save(self, *args, **kwargs)
        seen.append(self.state.global_step)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer.SARTrainer, "_save_checkpoint", power_failure)
        interrupted = train(base, data, cut, *options, "2")
    resumed = train(base, data, cut, *options, "2", "--resume")

    assert (interrupted, resumed, seen) == (130, 0, [10])
    assert [row["loss"] for row in log(cut)] == [row["loss"] for row in log(whole)]
    weights = "space_adapter.safetensors" if method == "adapter" else "model.safetensors"
    expected, found = load_file(whole / weights), load_file(cut / weights)
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


@pytest.mark.parametrize("method", ["full", "adapter"])
def test_an_early_stop_keeps_the_best_weights(make_base, data, tmp_path, method):
    output = tmp_path / "out"
    # a rate at which the held-out loss soon rises
    options = ("--learning-rate", "0.3", "--save-steps", "2", "--epochs", "9", "--distill", "off", "--early-stop", "3")

    code = train(make_base(), data, output, "--method", method, *options)

    losses = {
        row["step"]: row["eval_loss"]
        for row in map(json.loads, (output / "training.jsonl").read_text().splitlines())
        if "eval_loss" in row and row["step"]
    }
    best = min(list(losses)[:-1], key=losses.__getitem__)
    weights = "space_adapter.safetensors" if method == "adapter" else "model.safetensors"
    found, expected = load_file(output / weights), load_file(output / f"checkpoint-{best}" / weights)
    assert code == 0
    assert max(losses) < 36 * 9 / 2
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_held_out_answers_tell_whether_the_model_got_worse(make_base, data, tmp_path):
    output = tmp_path / "out"

    assert train(make_base(), data, output, "--method", "full", "--max-steps", "20", "--distill", "off") == 0

    config = json.loads((output / "space_config.json").read_text())
    before, after = config["acceptance"]["before"], config["acceptance"]["after"]
    # the base has no masks: plain AR
    assert before["candidates"] == 0
    assert before["tokens_per_step"] == 1
    assert before["prompts"] == after["prompts"] == 4
    assert after["answer_loss"] != before["answer_loss"]


def test_the_papers_form_is_measured_on_whole_examples_too(make_base, data, tmp_path):
    base, losses = make_base(), []
    for form in ("groups", "paper"):
        output = tmp_path / form
        options = ("--method", "full", "--max-steps", "2", "--distill", "off", "--form", form)
        assert train(base, data, output, *options) == 0
        losses.append(json.loads((output / "training.jsonl").read_text().splitlines()[0])["eval_ar_loss"])

    assert losses[0] == losses[1]


def test_an_adapter_leaves_its_base_alone(make_base, data, tmp_path):
    base = make_base()
    before = {file.name: file.read_bytes() for file in base.iterdir()}

    assert train(base, data, tmp_path / "out", "--method", "adapter", "--max-steps", "4") == 0

    assert {file.name: file.read_bytes() for file in base.iterdir()} == before


def test_an_adapter_over_a_four_bit_base(tiny_tokenizer, data, tmp_path, capsys):
    tiny_model("llama", hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    four_bit = ("--quantization", "nf4")

    code = train(tmp_path / "base", data, tmp_path / "out", *four_bit, "--max-steps", "10", "--distill", "4")
    capsys.readouterr()
    options = (
        "--suite",
        str(data),
        "--limit",
        "2",
        "--max-new-tokens",
        "12",
        "--dtype",
        "float32",
        "-q",
        "--json",
        "-",
    )
    checked = run(["verify-lossless", "--model", str(tmp_path / "out"), *four_bit, *options])

    record = json.loads(capsys.readouterr().out)
    assert code == checked == 0
    assert record["identical"] == 2
    assert "base" in {row["against"] for row in record["rows"]}


@pytest.mark.parametrize("masks", ["single", "distinct"])
@pytest.mark.parametrize("form", ["groups", "paper"])
def test_forms_and_mask_ids_are_chosen(make_base, data, tmp_path, masks, form):
    options = ("--masks", masks, "--form", form, "--groups", "2", "--p-sar", "1", "--mask-loss-weight", "0.5")

    code = train(
        make_base(), data, tmp_path / "out", *options, "--method", "full", "--max-steps", "4", "--distill", "off"
    )

    config = json.loads((tmp_path / "out" / "space_config.json").read_text())
    assert code == 0
    assert len(config["mask_token_ids"]) == (1 if masks == "single" else 3)
    assert config["training"]["form"] == form


def test_answers_of_the_base_are_kept_and_not_asked_for_twice(make_base, data, tmp_path, monkeypatch):
    from space_cli.training import distill

    base, output = make_base(), tmp_path / "out"
    options = ("--method", "full", "--max-steps", "4", "--distill", "8", "--temperatures", "0,0.9")
    assert train(base, data, output, *options) == 0
    answers = (output / "distilled.jsonl").read_text()
    # cut off in the middle of a line, as by a crash
    (output / "distilled.jsonl").write_text(answers[: len(answers) // 2])
    asked = []
    answer = distill.answer_in_batches
    monkeypatch.setattr(
        distill, "answer_in_batches", lambda model, some, **rest: asked.extend(some) or answer(model, some, **rest)
    )

    assert train(base, data, output, *options, "--resume") == 0

    assert 0 < len(asked) < 8
    again = [line for line in (output / "distilled.jsonl").read_text().splitlines() if line.endswith("}")]
    assert {json.loads(line)["key"] for line in again} == {
        json.loads(line)["key"] for line in answers.split("\n") if line
    }


def test_a_checkpoint_that_was_cut_off_is_passed_over(make_base, data, tmp_path):
    base, output = make_base(), tmp_path / "out"
    options = ("--method", "full", "--max-steps", "20", "--save-steps", "10", "--distill", "off")
    assert train(base, data, output, *options) == 0
    (output / "checkpoint-20" / "trainer_state.json").unlink()
    shutil.copytree(output / "checkpoint-10", output / "checkpoint-15")
    (output / "checkpoint-15" / "trainer_state.json").write_text('{"half')
    shutil.copytree(output / "checkpoint-10", output / "checkpoint-16")
    weights = output / "checkpoint-16" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])

    found = trainer.complete_checkpoints(output)

    assert [path.name for path in found] == ["checkpoint-10"]
    assert train(base, data, output, *options, "--resume") == 0


def test_nothing_is_resumed_with_other_settings(make_base, data, tmp_path, capsys):
    base, output = make_base(), tmp_path / "out"
    assert train(base, data, output, "--method", "full", "--max-steps", "2", "--distill", "off") == 0

    code = train(
        base, data, output, "--method", "full", "--max-steps", "2", "--distill", "off", "--groups", "3", "--resume"
    )

    assert code == 2
    assert "was trained with other settings: groups 8 instead of 3" in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_asks_itself_for_some_hours(make_base, tmp_path):
    base, output = make_base(), tmp_path / "out"
    options = ("--method", "adapter", "--distill", "24", "--max-length", "200", "--save-steps", "4", "--template")

    code = train(base, "self", output, *options, "Q:{}A:", "--hours", "0.004")
    first = log(output)
    resumed = train(base, "self", output, *options, "Q:{}A:", "--hours", "0.006", "--resume")

    rows = log(output)
    asked = [json.loads(line)["question"] for line in (output / "self.jsonl").read_text().split("\n") if line]
    assert code == resumed == 0
    assert len(asked) == len(set(asked)) > 0
    # an ended training is summed up; taken up again, it goes on in the summary's place
    kept = list(takewhile(lambda row: "train_runtime" not in row, first))
    assert rows[: len(kept)] == kept != []
    assert max(row["step"] for row in rows) > max(row["step"] for row in first)
    assert json.loads((output / "space_config.json").read_text())["training"]["hours"] == 0.006


def test_an_adapter_is_trained_further(make_base, data, tmp_path, capsys):
    base, first, second = make_base(), tmp_path / "first", tmp_path / "second"
    options = ("--max-steps", "4", "--distill", "off")
    assert train(base, data, first, "--method", "adapter", "--rank", "4", *options) == 0

    code = train(first, data, second, *options)
    refused = train(first, data, tmp_path / "third", "--rank", "8", *options)

    before, after = (json.loads((folder / "space_config.json").read_text()) for folder in (first, second))
    assert (code, refused) == (0, 2)
    assert "carries an adapter of 3 masks and rank 4" in capsys.readouterr().err
    assert after["method"] == "adapter"
    assert after["mask_token_ids"] == before["mask_token_ids"]
    assert after["base_model"] == before["base_model"]
    assert (
        load_file(second / "space_adapter.safetensors").keys() == load_file(first / "space_adapter.safetensors").keys()
    )
