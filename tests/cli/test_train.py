import json
import signal
import subprocess
import sys

import pytest

FAST = ("--dtype", "float32", "--candidates", "3", "--answer-tokens", "12", "--max-length", "60", "--max-steps", "12")


@pytest.fixture
def data(tmp_path):
    rows = [{"instruction": f"Add {n}.", "output": f"a + {n}"} for n in range(30)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "data.jsonl"


def test_a_training_without_a_terminal_is_plain_text(run_space_apart, tiny_model_dir, data, tmp_path):
    done = run_space_apart("train", "--model", tiny_model_dir, "--data", data, "--output", tmp_path / "out", *FAST)

    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert "format alpaca" in done.stderr
    assert "Human:Add 0.\nAssistant:a + 0" in done.stderr
    assert "step 10/12  AR loss" in done.stderr
    assert "before training: 1." in done.stdout
    assert "after training: 1." in done.stdout
    # a base that has such masks already keeps them
    config = json.loads((tmp_path / "out" / "space_config.json").read_text())
    assert config["mask_token_ids"] == [296, 297, 298]


def test_a_form_of_a_turn_is_chosen(run_space, tiny_model_dir, data, tmp_path):
    options = ("--template", r"Q: {}\nA:", "--distill", "off")

    done = run_space("train", "--model", tiny_model_dir, "--data", data, "--output", tmp_path / "out", *FAST, *options)

    assert done.returncode == 0, done.stderr
    assert "Q: Add 0.\nA:a + 0" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--distill", "many"], "--distill many: neither a number nor off"),
        (["--temperatures", "warm"], "--temperatures warm: not numbers"),
        (["--temperatures", "-1"], "--temperatures -1: out of range"),
        (["--method", "half"], "Invalid value for '--method'"),
        (["--resume"], "no training to resume"),
        (["--data", "absent.jsonl"], "absent.jsonl"),
        (["--template", "no gap"], "{}"),
        (["--quantization", "nf4", "--method", "full"], "cannot train quantised weights"),
    ],
)
def test_wrong_values_are_one_line_and_exit_code_2(run_space, tiny_model_dir, data, tmp_path, arguments, message):
    given = ("train", "--model", tiny_model_dir, "--data", data, "--output", tmp_path / "out", *FAST, "-q")

    done = run_space(*given, *arguments)

    assert done.returncode == 2
    assert done.stdout == ""
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_malformed_row_is_reported_with_its_line(run_space, tiny_model_dir, data, tmp_path):
    data.write_text(data.read_text() + '{"instruction": "x", "output": 7}\n')

    done = run_space("train", "--model", tiny_model_dir, "--data", data, "--output", tmp_path / "out", *FAST)

    assert done.returncode == 2
    assert "data.jsonl:31: 'output'" in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_not_empty_is_left_alone(run_space, tiny_model_dir, data, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")

    done = run_space("train", "--model", tiny_model_dir, "--data", data, "--output", tmp_path / "out", *FAST)

    assert done.returncode == 2
    assert "is not empty; give --resume to go on with it, or --overwrite" in done.stderr
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("method", ["full", "adapter"])
def test_a_dry_run_says_what_a_training_takes_and_leaves_nothing(run_space, tiny_model_dir, data, tmp_path, method):
    options = ("--dry-run", "--method", method, "--rank", "4", "--epochs", "3")

    done = run_space("train", "--model", tiny_model_dir, "--data", data, "--output", tmp_path / "out", *FAST, *options)

    assert done.returncode == 0, done.stderr
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)
    assert {"trained", "memory", "speed", "time"} <= set(lines)
    assert lines["time"].startswith("12 steps of ")
    assert "tokens/s with masks" in lines["speed"]
    assert ("times the cost" in lines["speed"]) == (method == "full")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_can_be_read_about(run_space, tiny_model_dir, data, tmp_path):
    done = run_space("train", "--model", tiny_model_dir, "--data", data, "--output", tmp_path / "out", *FAST)

    rows = [json.loads(line) for line in (tmp_path / "out" / "training.jsonl").read_text().splitlines()]
    card = (tmp_path / "out" / "README.md").read_text()
    assert done.returncode == 0, done.stderr
    shown = {"ar_loss", "mask_loss", "mask_accuracy_3", "expected_tokens_per_step"}
    assert {f"eval_{name}" for name in shown} <= set(rows[0])
    assert shown | {"tokens_per_second", "memory_bytes"} <= set(rows[1])
    assert (tmp_path / "out" / "training.png").read_bytes().startswith(b"\x89PNG")
    assert "All weights were tuned" in card
    assert "| after | 3 |" in card


@pytest.mark.slow
def test_two_processes_train_one_model(clean_env, tiny_model_dir, data, tmp_path):
    options = ("--data", data, "--output", tmp_path / "out", *FAST, "--method", "adapter", "--distill", "4")
    launch = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1")
    flags = ("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")
    command = [sys.executable, *launch, *flags, "-m", "space_cli", "train", "--model", tiny_model_dir, *options]

    done = subprocess.run(
        list(map(str, command)), env=clean_env, capture_output=True, text=True, timeout=280, check=False
    )

    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("step 10/12") == 1
    assert done.stdout.count("after training") == 1
    assert len((tmp_path / "out" / "distilled.jsonl").read_text().split()) > 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "training.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 12
    assert (tmp_path / "out" / "space_adapter.safetensors").is_file()


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX limits")
@pytest.mark.parametrize("method", ["full", pytest.param("adapter", marks=pytest.mark.slow)])
def test_a_full_disk_costs_no_checkpoint(clean_env, stop_space, run_space, tiny_model_dir, data, tmp_path, method):
    import resource

    from space_cli.training.trainer import complete_checkpoints

    output = tmp_path / "out"
    options = ("--output", output, *FAST, "--method", method, "--distill", "off", "--save-steps", "4", "--quiet")
    arguments = ("train", "--model", tiny_model_dir, "--data", data, *options)

    # files that may not grow beyond this stand for a disk without room
    def limited(size):
        return subprocess.run(
            [sys.executable, "-m", "space_cli", *map(str, arguments), *(["--resume"] if output.is_dir() else [])],
            env=clean_env,
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
        )

    at_once = limited(4_000)
    stop_space(*[each for each in arguments if each != "--quiet"], "--resume", at="saved")
    kept = [path.name for path in complete_checkpoints(output)]
    later = limited(4_000)

    assert at_once.returncode == later.returncode == 3
    assert at_once.stderr.startswith("space: the disk is full")
    assert at_once.stderr.endswith("no checkpoint was written yet; the same command with --resume goes on\n")
    assert later.stderr.endswith(f"{kept[0]} is kept; the same command with --resume goes on\n")
    assert len(at_once.stderr.splitlines()) == len(later.stderr.splitlines()) == 1
    assert [path.name for path in complete_checkpoints(output)] == kept
    assert run_space(*arguments, "--resume").returncode == 0


def test_data_that_vanished_or_changed_are_reported_and_nothing_is_lost(run_space, tiny_model_dir, data, tmp_path):
    options = ("--output", tmp_path / "out", *FAST, "--distill", "off", "--save-steps", "4", "--quiet")
    arguments = ("train", "--model", tiny_model_dir, "--data", data, *options)
    assert run_space(*arguments).returncode == 0
    files = {path.name for path in (tmp_path / "out").iterdir()}
    content = data.read_text()

    data.unlink()
    vanished = run_space(*arguments, "--resume")
    data.write_text(content.replace("a + 7", "a - 7"))
    changed = run_space(*arguments, "--resume")

    assert vanished.returncode == changed.returncode == 2
    assert "data.jsonl" in vanished.stderr
    assert "was trained with other settings: data " in changed.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == files


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize("stopped_by", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "ctrl-c"])
def test_a_training_that_was_stopped_is_taken_up_again(
    stop_space, run_space, tiny_model_dir, data, tmp_path, stopped_by
):
    options = ("--output", tmp_path / "out", *FAST, "--save-steps", "1", "--max-steps", "150", "--epochs", "90")
    arguments = ("train", "--model", tiny_model_dir, "--data", data, "--distill", "4", *options)

    process, _, err = stop_space(*arguments, at="checkpoint-3", signal_number=stopped_by)
    resumed = run_space(*arguments, "--resume", "--quiet")

    rows = [json.loads(line) for line in (tmp_path / "out" / "training.jsonl").read_text().splitlines()]
    assert process.returncode == (130 if stopped_by == signal.SIGINT else -signal.SIGKILL)
    if stopped_by == signal.SIGINT:
        assert "is kept; the same command with --resume goes on" in err.splitlines()[-1]
    assert resumed.returncode == 0, resumed.stderr
    assert max(row["step"] for row in rows) == 150
