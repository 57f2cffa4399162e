"""What a training begins with: names it is given, its base, its folder, what its model is to save."""

import json
from pathlib import Path

import pytest
import torch
from running import refusal
from tiny import lively, tiny_configs

from space_cli.core.decoder import decode
from space_cli.core.sampling import Sampler
from space_cli.core.stopping import StopRule
from space_cli.training.distill import Distillation, distil

CHATML = "{% for m in messages %}{{ m.role }}\n{{ m.content }}<|mask1|>\n{% endfor %}"
FAST = (
    "--dtype", "float32", "--candidates", "3", "--answer-tokens", "16", "--batch-size", "2", "--max-steps", "2",
    "--save-steps", "1", "--held-out", "0",
)  # fmt: skip


@pytest.fixture
def base(tiny_tokenizer, tmp_path):
    """Save a tiny random model of a family."""
    return save(tmp_path / "base", tiny_tokenizer)


def save(folder, tokenizer, family="llama", scale=0.2):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(tiny_configs()[family], dtype=torch.float32)
    lively(model, scale).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    rows = [{"prompt": f"def f{n}(a, b):\n", "completion": f"    return a + {n}\n"} for n in range(8)]
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def train(space, data):
    def run(model, output, *options):
        return space("train", "--model", model, "--data", data, "--output", output, *FAST, *options)

    return run


# Names


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        (("--optim", "nonsense"), "--optim nonsense: no optimizer of that name; as adamw_torch"),
        (("--optim", "adamw_torhc"), "adamw_torch"),
        (("--optim", "galore_adamw"), "--optim galore_adamw: cannot be used here: "),
        (("--report-to", "nonsense"), "--report-to nonsense: nothing of that name to report to; use none"),
        (("--report-to", "comet_ml"), "--report-to comet_ml: its package is not installed"),
    ],
)
def test_names_that_cannot_be_used_are_refused_before_any_work(space, data, tmp_path, option, expected):
    line = refusal(space("train", "--model", "no/such/model", "--data", data, "--output", "out", *option))

    assert expected in line
    assert not (tmp_path / "out").exists()


# The base


@pytest.mark.parametrize("method", ["full", "adapter"])
def test_a_training_is_not_taken_up_with_other_weights_of_the_same_shapes(train, base, tiny_tokenizer, method):
    options = ("--method", method, "--distill", "off")
    assert train(base, "out", *options).returncode == 0
    save(base, tiny_tokenizer, scale=0.3)

    refused = train(base, "out", *options, "--resume", "--quiet")

    assert "out: was trained on other weights" in refusal(refused)


def test_answers_of_other_weights_under_one_name_are_not_taken(train, base, tiny_tokenizer, tmp_path):
    options = ("--method", "adapter", "--distill", "2")
    train(base, "out", *options)
    first = (tmp_path / "out" / "distilled.jsonl").read_text().splitlines()
    save(base, tiny_tokenizer, scale=0.3)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "distilled.jsonl").write_text("\n".join(first))

    train(base, "other", *options, "--overwrite")

    lines = (tmp_path / "other" / "distilled.jsonl").read_text().split("\n")
    keys = [json.loads(line)["key"] for line in lines if line.strip()]
    assert len(set(keys)) == 4


def test_zero_is_greedy_whatever_the_generation_config_says(tiny_models, tmp_path):
    import copy

    model = copy.deepcopy(tiny_models["llama"])
    model.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=3.0, num_beams=2)
    prompt = [5, 6, 7]
    settings = Distillation(12, (0.0,), 2, 0, "x")

    pairs = distil(
        model, [prompt, [9, 8]], settings, eos_token_ids=frozenset(), file=tmp_path / "a", on_progress=lambda *_: None
    )

    for asked, answer in pairs:
        steps = decode(model, asked, stop=StopRule(12), sampler=Sampler())
        assert answer == [token for step in steps for token in step.tokens]


# Prompts near the end of the context


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_prompts_without_room_for_an_answer_are_not_answered_and_told(space, tiny_tokenizer, tmp_path, family):
    base = save(tmp_path / "base", tiny_tokenizer, family)
    rows = [{"prompt": "x" * length, "completion": "ab" * 3} for length in (245, 4, 5)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    done = space(
        "train", "--model", base, "--data", "d.jsonl", "--output", "out", *FAST, "--method", "adapter", "--distill", "3"
    )

    assert done.returncode == 0, done
    assert "1 prompts leave no room for an answer of 16 tokens: not answered" in done.stderr
    keys = [line for line in (tmp_path / "out" / "distilled.jsonl").read_text().splitlines() if line]
    assert len(keys) == 2


# The folder


def test_overwriting_leaves_nothing_of_an_earlier_training_but_what_others_wrote(train, base, tmp_path):
    output = tmp_path / "out"
    assert train(base, "out", "--method", "adapter", "--distill", "2").returncode == 0
    (output / "notes.txt").write_text("mine")
    old = {file.name for file in output.iterdir()}

    done = train(base, "out", "--method", "full", "--distill", "off", "--overwrite", "--max-steps", "1")

    assert done.returncode == 0, done
    now = {file.name for file in output.iterdir()}
    assert {"adapter_config.json", "space_adapter.safetensors", "checkpoint-2"} <= old - now
    assert {"model.safetensors", "checkpoint-1", "notes.txt"} <= now
    assert "distilled.jsonl" not in now


def test_a_model_is_not_overwritten_by_its_own_training(train, base, tmp_path):
    assert train(base, "out", "--method", "full", "--distill", "off").returncode == 0

    refused = train("out", "out", "--method", "full", "--distill", "off", "--overwrite", "--quiet")

    assert "is the folder of the model to be trained" in refusal(refused)
    assert (tmp_path / "out" / "model.safetensors").is_file()


# What the model is to save


def test_a_generation_config_that_cannot_be_saved_is_repaired_and_gets_the_ids_that_end_a_turn(
    train, base, tmp_path, tiny_tokenizer
):
    file = base / "generation_config.json"
    file.write_text(json.dumps({"do_sample": False, "temperature": 0.9, "top_p": 0.6, "eos_token_id": 3}))
    (base / "chat_template.jinja").write_text(CHATML)

    done = train(base, "out", "--method", "full", "--distill", "off", "--template", "{}")

    assert done.returncode == 0, done
    assert "do_sample is set to true" in done.stderr
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    end = tiny_tokenizer.convert_tokens_to_ids("<|mask1|>")
    assert (saved["do_sample"], saved["temperature"]) == (True, 0.9)
    assert saved["eos_token_id"] == sorted({3, tiny_tokenizer.eos_token_id, end})
    assert Path(tmp_path / "out" / "space_config.json").is_file()
