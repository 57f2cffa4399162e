import json
import os
import sys

import pytest

FAST = ("--dtype", "float32", "--max-new-tokens", "16", "--quiet")


@pytest.fixture
def verify(run_space, tiny_model_dir, prompts_file):
    """Run the command on the tiny SPACE checkpoint and two prompts."""

    def run(*arguments, model=tiny_model_dir):
        return run_space("verify-lossless", "--model", model, "--suite", prompts_file, *FAST, *arguments)

    return run


def test_a_lossless_model_is_reported_so(verify):
    done = verify()

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "LOSSLESS: 32 tokens of 2 answers are identical"
    rows = [line.split() for line in done.stdout.splitlines()]
    *answers, drafts = [row for row in rows if row and row[0] in ("ar", "hf", "drafts")]
    assert answers == [["ar", "2", "2", "0", "0"], ["hf", "2", "2", "0", "0"]]
    # a step that follows one without a mask group has no guess to check
    assert drafts[2] == drafts[1] > "3"
    assert drafts[3:] == ["0", "0"]
    assert "\x1b" not in done.stdout


def test_json_holds_the_contract(verify, tmp_path):
    done = verify("--json", tmp_path / "proof.json", "--drafts", "mixed")

    record = json.loads((tmp_path / "proof.json").read_text())
    assert done.returncode == 0
    assert record["complete"] is record["lossless"] is True
    assert (record["prompts"], record["tokens"], record["identical"], record["divergences"]) == (2, 32, 2, [])
    assert record["settings"]["drafts"] == "mixed"
    assert record["settings"]["numerics"] == "plain"
    assert record["environment"]["dtype"] == "float32"
    assert record["never_accepted"] == []
    assert len(record["accepted"]) == 4
    assert record["kernels"]["positions"] > 0


def test_json_on_standard_output_stands_alone(verify):
    done = verify("--json", "-", "--limit", "1")

    assert json.loads(done.stdout)["lossless"] is True
    assert "LOSSLESS" in done.stderr


def test_sampled_answers_are_compared_under_each_seed_and_in_distribution(verify):
    sampling = ("--temperature", "0.9", "--top-k", "60", "--top-p", "0.95", "--min-p", "0.01", "--seed", "5")

    done = verify(*sampling, "--repetition-penalty", "1.1", "--seeds", "3", "--draws", "150", "--json", "-")

    record = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert [answer["seed"] for answer in record["answers"]] == [5, 6, 7, 5, 6, 7]
    assert len({tuple(answer["token_ids"]) for answer in record["answers"]}) == 6
    assert {test["method"] for test in record["distributions"]} == {"ar", "space"}
    assert all(test["bins"] > 2 and test["draws"] == 150 for test in record["distributions"])


@pytest.mark.parametrize("sampling", [(), ("--temperature", "0.9", "--top-k", "20", "--draws", "150")])
def test_penalties_of_what_the_answer_has_are_kept_by_all_sides(verify, sampling):
    done = verify(*sampling, "--presence-penalty", "1.5", "--frequency-penalty", "0.5", "--json", "-")

    record = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert record["settings"]["sampling"]["presence_penalty"] == 1.5
    assert record["settings"]["sampling"]["frequency_penalty"] == 0.5


@pytest.mark.parametrize("numerics", ["plain", "invariant", "same-shape"])
def test_numerics_are_chosen(verify, numerics):
    done = verify("--numerics", numerics, "--candidates", "2", "--dtype", "bfloat16", "--json", "-")

    record = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert record["settings"]["numerics"] == numerics
    assert record["settings"]["candidates"] == 2


@pytest.mark.parametrize("against", ["ar", "hf", "hf, ar"])
def test_against_chooses_the_other_side(verify, against):
    record = json.loads(verify("--against", against, "--json", "-").stdout)

    assert {row["against"] for row in record["rows"]} == {*against.replace(" ", "").split(","), "drafts"}


@pytest.mark.parametrize("suffix", ["md", "html"])
def test_a_report_is_written(verify, tmp_path, suffix):
    done = verify("--report", tmp_path / f"proof.{suffix}")

    text = (tmp_path / f"proof.{suffix}").read_text()
    assert done.returncode == 0
    assert "LOSSLESS: 32 tokens of 2 answers are identical" in text
    assert ("<table>" in text) == (suffix == "html")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "gpt"], "--against gpt: nothing of that name to compare with; use ar, hf, base"),
        (["--against", "base"], "is no adapter; use ar, hf or both"),
        (["--seeds", "2"], "--seeds: greedy answers depend on no seed; give --temperature too"),
        (["--drafts", "best"], "Invalid value for '--drafts'"),
        (["--numerics", "exact"], "Invalid value for '--numerics'"),
        (["--candidates", "9"], "was trained for 1 to 3"),
        (["--report", "proof.pdf"], "--report proof.pdf: unknown kind of file; end it with .html or .md"),
        (["--report", "absent/proof.md"], "--report absent/proof.md: there is no folder"),
        (["--draws", "3"], "Invalid value for '--draws'"),
        (["--max-new-tokens", "256"], "prompts do not fit, with 256 new tokens, into the context of"),
    ],
)
def test_wrong_values_are_one_line_and_exit_code_2(verify, arguments, message):
    done = verify(*arguments)

    assert done.returncode == 2
    assert done.stdout == ""
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_model_without_masks_is_checked_with_copies_and_with_mixed_drafts(
    verify, tiny_models, tiny_tokenizer, tmp_path
):
    folder = tmp_path / "plain"
    tiny_models["qwen2"].save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)

    done = verify("--json", "-", "--max-new-tokens", "24", "--drafts", "mixed", model=folder)
    copies = verify("--max-new-tokens", "24", model=folder)
    own, many = verify("--drafts", "model", model=folder), verify("--candidates", "99", model=folder)

    record = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert record["settings"]["drafts"] == "mixed"
    assert record["never_accepted"] == []
    assert own.returncode == many.returncode == 2
    assert "has no masks to draft with; use --drafts adaptive or mixed" in own.stderr
    assert copies.returncode == 0, copies.stderr
    assert "has no masks: what is guessed is copied" in copies.stdout
    assert "drafts: adaptive" in copies.stdout
    assert "--candidates 99: out of range; choose 1 to 31" in many.stderr


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_quantised_models_are_checked(verify, tiny_tokenizer, tmp_path, quantization):
    from tiny import tiny_model

    tiny_model("llama", hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(tmp_path / "plain")
    tiny_tokenizer.save_pretrained(tmp_path / "plain")

    done = verify("--quantization", quantization, "--json", "-", model=tmp_path / "plain")

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["lossless"] is True


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_keeps_what_is_done(stop_space, tiny_model_dir, prompts_file, tmp_path):
    prompts_file.write_text("".join(json.dumps({"prompt": f"def f{n}("}) + "\n" for n in range(5000)))
    record = tmp_path / "proof.json"
    options = ("--model", tiny_model_dir, "--suite", prompts_file, "--json", record, *FAST[:-1])

    process, out, _ = stop_space("verify-lossless", *options, at="answers  ar")

    saved = json.loads(record.read_text())
    assert process.returncode == 130
    assert "Interrupted after" in out
    assert "answers are identical" in out
    assert saved["complete"] is False
    assert 0 < len(saved["answers"]) < 5000


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_report_that_cannot_be_written_does_not_cost_the_verdict(verify, tmp_path):
    (tmp_path / "full.html").symlink_to("/dev/full")

    done = verify("--report", tmp_path / "full.html")

    assert done.returncode == 3
    assert "could not be written: No space left on device" in done.stderr
    assert "LOSSLESS: 32 tokens" in done.stdout


def test_hostile_names_and_text_do_nothing(verify, prompts_file, tmp_path):
    name = "\x1b]0;x\x07<script>alert(1)</script>\n# heading ``` | cell"
    prompts_file.write_text(json.dumps({"prompt": "a\x1b[31m[red]", "task_id": name}) + "\n")

    done = verify("--temperature", "1", "--draws", "100", "--report", tmp_path / "proof.html")

    page = (tmp_path / "proof.html").read_text()
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr + page
    assert "<script>" not in page
    assert page.count("<h1>") == 1
