import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

FAST = ("--dtype", "float32", "--max-new-tokens", "12")


def bench(run_space, model, *arguments, **env):
    return run_space("bench", "--model", model, *FAST, *arguments, **env)


def test_a_run_without_a_terminal_is_plain_text(run_space_apart, tiny_model_dir, prompts_file):
    done = bench(run_space_apart, tiny_model_dir, "--suite", prompts_file, "--methods", "ar,space,hf,hf-lookup")

    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert "\r" not in done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    for method in ("ar", "space", "hf", "hf-lookup"):
        row = next(row for row in rows if row and row[0] == method)
        assert row[1] == "24"
        assert row[-1] == "yes"
    assert "float32" in done.stdout.splitlines()[-1]
    assert "2/2 prompts" in done.stderr


def test_json_holds_the_contract(run_space, tiny_model_dir, prompts_file, tmp_path):
    done = bench(run_space, tiny_model_dir, "--suite", prompts_file, "--json", tmp_path / "run.json", "--seed", 3)

    record = json.loads((tmp_path / "run.json").read_text())
    assert done.returncode == 0
    assert record["complete"] is True
    assert {"space", "python", "torch", "transformers", "processor", "dtype", "device", "threads", "date"} <= set(
        record["environment"]
    )
    assert record["settings"]["sampling"]["seed"] == 3
    assert record["settings"]["candidates"] is None
    row = next(row for row in record["results"] if row["method"] == "space")
    fields = {"suite", "prompts", "tokens", "steps", "seconds", "tokens_per_second", "tokens_per_step", "speedup"}
    assert fields <= set(row)
    assert row["identical"] is True
    assert len(record["samples"]) == 6
    assert record["samples"][1]["task_id"] == "prompts/1"


def test_json_on_standard_output_stands_alone(run_space, tiny_model_dir, prompts_file):
    done = bench(run_space, tiny_model_dir, "--suite", prompts_file, "--methods", "ar", "--json", "-", "--quiet")

    assert json.loads(done.stdout)["results"][0]["method"] == "ar"
    assert "tok/s" in done.stderr


def test_sampled_runs_are_identical_under_a_seed(run_space, tiny_model_dir, prompts_file):
    options = ("--temperature", "0.8", "--top-k", "50", "--top-p", "0.95", "--min-p", "0.01")
    penalties = ("--repetition-penalty", "1.1", "--presence-penalty", "0.5", "--frequency-penalty", "0.25")
    done = bench(run_space, tiny_model_dir, "--suite", prompts_file, *options, *penalties, "--json", "-")

    record = json.loads(done.stdout)
    assert record["settings"]["sampling"]["presence_penalty"] == 0.5
    assert record["settings"]["sampling"]["frequency_penalty"] == 0.25
    rows = {row["method"]: row for row in record["results"]}
    assert set(rows) == {"ar", "space"}
    assert rows["space"]["identical"] is True


def test_candidates_choose_the_block(run_space, tiny_model_dir, prompts_file):
    done = bench(run_space, tiny_model_dir, "--suite", prompts_file, "--candidates", "1", "--json", "-", "--limit", "1")

    samples = {sample["method"]: sample for sample in json.loads(done.stdout)["samples"]}
    assert max(samples["space"]["tokens_by_step"]) <= 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--candidates", "0"], "was trained for 1 to 3; choose 1 to 3"),
        (["--candidates", "4"], "was trained for 1 to 3"),
        (["--methods", "ar,beam"], "no method named 'beam'"),
        (["--max-new-tokens", "256"], "prompts do not fit, with 256 new tokens, into the context of"),
        (["--dtype", "int4"], "'int4' is not one of 'auto', 'float32'"),
        (["--device", "abacus"], "unknown device 'abacus'"),
        (["--quantization", "q4"], "'q4' is not one of 'none', 'q8_0'"),
    ],
)
def test_wrong_values_are_one_line_and_exit_code_2(run_space, tiny_model_dir, prompts_file, arguments, message):
    done = bench(run_space, tiny_model_dir, "--quiet", "--suite", prompts_file, *arguments)

    assert done.returncode == 2
    assert done.stdout == ""
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "message"), [("", "no prompts in it"), ('{"prompt": "a"}\n{oops\n', "prompts.jsonl:2: not JSON")]
)
def test_a_bad_suite_file_is_reported_with_the_line(run_space, prompts_file, content, message):
    prompts_file.write_text(content)

    done = run_space("bench", "--suite", prompts_file)

    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_hostile_names_and_text_do_nothing(run_space, tiny_model_dir, tmp_path):
    file = tmp_path / "hostile.jsonl"
    file.write_text(json.dumps({"prompt": "a\x1b[31m[red]", "task_id": "\x1b]0;x\x07"}) + "\n")

    done = bench(run_space, tiny_model_dir, "--suite", file, "--methods", "ar")

    assert done.returncode == 0
    assert "\x1b" not in done.stdout + done.stderr


def test_ctrl_c_keeps_what_is_done(stop_space, tiny_model_dir, tmp_path):
    prompts = tmp_path / "many.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"def f{n}("}) + "\n" for n in range(5000)))
    record = tmp_path / "run.json"
    options = ("--model", tiny_model_dir, "--suite", prompts, "--json", record, *FAST)

    process, out, _ = stop_space("bench", *options, at="prompts  ar")

    saved = json.loads(record.read_text())
    assert process.returncode == 130
    assert "Interrupted after" in out
    assert "tok/step" in out
    assert saved["complete"] is False
    assert 0 < len(saved["samples"]) < 15000
    assert saved["results"]


@pytest.mark.slow
def test_a_run_that_was_killed_is_taken_up_where_it_was(stop_space, run_space, tiny_model_dir, tmp_path):
    prompts = tmp_path / "many.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"def f{n}("}) + "\n" for n in range(2500)))
    options = ("--model", tiny_model_dir, "--suite", prompts, "--methods", "ar", "--json", tmp_path / "run.json")
    options += ("--dtype", "float32", "--max-new-tokens", "6")

    process, *_ = stop_space("bench", *options, at="prompts  ar", signal_number=signal.SIGKILL)
    kept = (tmp_path / "run.json.partial").read_text().splitlines()[1:]
    refused = run_space("bench", *options)
    other = run_space("bench", *options, "--seed", "1", "--resume")
    done = run_space("bench", *options, "--resume")

    record = json.loads((tmp_path / "run.json").read_text())
    assert process.returncode == -signal.SIGKILL
    assert 0 < len(kept) < 2500
    assert refused.returncode == other.returncode == 2
    assert "add --resume to go on, or delete it to start over" in refused.stderr
    assert "of a run with other sampling" in other.stderr
    assert done.returncode == 0, done.stderr
    assert record["complete"] is True
    assert record["samples"][: len(kept) - 1] == [json.loads(line)[0] for line in kept[:-1]]
    assert len({sample["task_id"] for sample in record["samples"]}) == len(record["samples"]) == 2500
    assert not (tmp_path / "run.json.partial").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume"], "--resume takes up a run that wrote a file; give the same --json FILE"),
        (["--resume", "--json", "-"], "--resume takes up a run that wrote a file"),
        (["--seeds", "2"], "--seeds: greedy answers depend on no seed; give --temperature too"),
        (["--sweep", "candidates=3..1"], "not understood; give candidates=1..8 or candidates=1,2,5"),
        (["--sweep", "k=1..8"], "not understood"),
        (["--sweep", "candidates=0..2"], "not understood"),
        (["--sweep", "candidates=1..2", "--methods", "ar"], "--sweep chooses methods and candidates itself"),
    ],
)
def test_options_that_do_not_go_together_are_reported_before_a_model_is_loaded(run_space, arguments, message):
    done = run_space("bench", "--model", "no-such-model", *arguments)

    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_sweep_names_the_fastest_k(run_space, tiny_model_dir, prompts_file):
    done = bench(run_space, tiny_model_dir, "--suite", prompts_file, "--sweep", "candidates=1..4", "--json", "run.json")

    assert done.returncode == 0, done.stderr
    assert "left out: space-k4" in done.stderr
    fastest = re.search(r"Fastest here: k = ([123]) \((\d+\.\d\d)x on", done.stdout)
    rows = {line.split()[0]: line for line in done.stdout.splitlines() if line.startswith("space-k")}
    assert set(rows) == {"space-k1", "space-k2", "space-k3"}
    assert f" {fastest[2]}x " in rows[f"space-k{fastest[1]}"]


def test_two_runs_are_compared(run_space, tiny_model_dir, prompts_file, tmp_path):
    for name, k in (("before.json", "1"), ("after.json", "3")):
        options = ("--candidates", k, "--methods", "ar,space", "--json", name)
        assert bench(run_space, tiny_model_dir, "--suite", prompts_file, *options).returncode == 0

    done = run_space("bench", "compare", "before.json", "after.json")
    (tmp_path / "other.json").write_text("{}")
    refused = run_space("bench", "compare", "before.json", "other.json")
    alone = run_space("bench", "compare", "before.json")

    assert done.returncode == 0, done.stderr
    assert "candidates: 1 before, 3 after" in done.stdout
    assert "2 answers in both" in done.stdout
    assert re.search(r"(?m)^space .* too few prompts to tell +0 of 2", done.stdout)
    assert refused.returncode == alone.returncode == 2
    assert "other.json: not a record" in refused.stderr
    assert "Missing argument" in alone.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_record_that_cannot_be_written_does_not_cost_the_table(run_space, tiny_model_dir, prompts_file):
    done = bench(run_space, tiny_model_dir, "--suite", prompts_file, "--quiet", "--json", "/dev/full")

    assert done.returncode == 3
    assert "/dev/full: could not be written: No space left on device" in done.stderr
    assert "tok/step" in done.stdout


@pytest.mark.pty
@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_shows_the_run_live(clean_env, tiny_model_dir, prompts_file):
    import pty

    controller, terminal = pty.openpty()
    command = [sys.executable, "-m", "space_cli", "bench", "--model", tiny_model_dir, "--suite", prompts_file, *FAST]
    process = subprocess.Popen(
        list(map(str, command)), env=clean_env, stdin=terminal, stdout=terminal, stderr=terminal, close_fds=True
    )
    os.close(terminal)
    screen = b""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            piece = os.read(controller, 65536)
        except OSError:
            break
        if not piece:
            break
        screen += piece
    os.close(controller)

    text = screen.decode("utf-8", errors="replace")
    assert process.wait(timeout=60) == 0
    assert "tokens by step" in text
    assert "/2 prompts" in text
    assert "speedup" in text
    assert "Traceback" not in text


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler, which the compiled engine needs")
def test_a_compiled_model_gives_the_same_answers_and_is_compiled_once(run_space, tmp_path):
    command = (
        "bench",
        "--model",
        "nano",
        "--engine",
        "compiled",
        "--limit",
        "2",
        "--max-new-tokens",
        "24",
        "--dtype",
        "float32",
    )
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}

    first = run_space(*command, "--methods", "ar,space,space-chain,space-lookup,hf", "--json", "run.json", **cache)
    again = run_space(*command, "--methods", "ar,space", **cache)

    record = json.loads((tmp_path / "run.json").read_text())
    assert first.returncode == again.returncode == 0, first.stderr + again.stderr
    assert record["environment"]["engine"] == "compiled"
    assert all(result["identical"] for result in record["results"])
    assert "compiling" in first.stderr
    assert "compiling" not in again.stderr


def test_profile_names_where_time_goes(run_space, tmp_path):
    done = run_space(
        "bench", "--model", "nano", "--limit", "1", "--max-new-tokens", "8", "--profile", "--json", "run.json"
    )

    record = json.loads((tmp_path / "run.json").read_text())
    profile, samples = record["profile"], record["samples"]
    assert done.returncode == 0, done.stderr
    assert "A step, in milliseconds" in done.stdout
    assert "A model call, in milliseconds" in done.stdout
    # nano: 5.9 M parameters of two bytes, embeddings tied
    assert 11e6 < profile["weight_bytes"] < 13e6
    assert list(profile["seconds"]) == ["256", "512", "992"]
    assert all(list(seconds) == list(profile["seconds"]["256"]) for seconds in profile["seconds"].values())
    assert all(sum(sample["parts"].values()) < sample["seconds"] for sample in samples if sample["method"] != "hf")
    assert all(sample["parts"] is None for sample in samples if sample["method"] == "hf")


@pytest.mark.parametrize("command", ["bench", "verify-lossless"])
def test_an_engine_that_cannot_be_had_is_one_line(run_space, command):
    done = run_space(command, "--model", "nano", "--limit", "1", "--engine", "compiled", "--dtype", "float16")

    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == (
        "space: --engine compiled: nano: its dtype is float16; use --engine eager"
    )


def test_a_run_leaves_a_page_a_text_and_a_drawing(run_space, tiny_model_dir, prompts_file, tmp_path):
    page = bench(
        run_space, tiny_model_dir, "--suite", prompts_file, "--report", "run.html", "--plot", "run.svg", "--quiet"
    )
    text = bench(run_space, tiny_model_dir, "--suite", prompts_file, "--report", "run.md", "--plot", "run.png")

    assert page.returncode == text.returncode == 0, page.stderr + text.stderr
    assert "<title>space is " in (tmp_path / "run.html").read_text()
    assert (tmp_path / "run.md").read_text().startswith("# `space` is ")
    assert "<svg" in (tmp_path / "run.svg").read_text()
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--report", "run.pdf"], "--report run.pdf: unknown kind of file; end it with .html or .md"),
        (["--plot", "run.pdf"], "--plot run.pdf: unknown kind of file; end it with .png or .svg"),
        (["--plot", "absent/run.png"], "--plot absent/run.png: there is no folder"),
    ],
)
def test_a_file_that_could_not_be_written_is_reported_before_the_run(run_space, arguments, message):
    done = run_space("bench", *arguments)

    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_page_that_cannot_be_written_costs_neither_the_table_nor_the_drawing(
    run_space, tiny_model_dir, prompts_file, tmp_path
):
    (tmp_path / "full.html").symlink_to("/dev/full")
    files = ("--report", "full.html", "--plot", "run.svg")

    done = bench(run_space, tiny_model_dir, "--suite", prompts_file, "--quiet", *files)

    assert done.returncode == 3
    assert "could not be written: No space left on device" in done.stderr
    assert "tok/step" in done.stdout
    assert (tmp_path / "run.svg").exists()
