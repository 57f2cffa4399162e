"""`space chat` with one prompt: standard output, JSON, pipes."""

import json

import pytest

from space_cli.text import visible

PROMPT = ("--prompt", "def add(a, b):\n")
FAST = ("--dtype", "float32", "--max-new-tokens", "24")


def test_the_answer_alone_stands_on_standard_output(run_space, run_space_apart, tiny_model_dir):
    done = run_space_apart("chat", "--model", tiny_model_dir, *PROMPT, *FAST)
    record = json.loads(run_space("chat", "--model", tiny_model_dir, *PROMPT, *FAST, "--json", "-").stdout)

    assert done.returncode == 0, done.stderr
    assert done.stdout == visible(record["text"]) + "\n"
    assert done.stderr == ""


def test_the_record_holds_what_other_programs_rely_on(run_space, tiny_model_dir, tmp_path):
    done = run_space("chat", "--model", tiny_model_dir, *PROMPT, *FAST, "--json", tmp_path / "answer.json", "--raw")

    record = json.loads((tmp_path / "answer.json").read_text())
    assert done.returncode == 0, done.stderr
    assert record["complete"]
    assert record["tokens"] == len(record["token_ids"]) == sum(record["accepted_per_step"])
    assert record["steps"] == len(record["accepted_per_step"])
    assert record["tokens_per_second"] == pytest.approx(record["tokens"] / record["seconds"])
    assert record["prompt_tokens"] > 0


@pytest.mark.parametrize("options", [(), ("--temperature", "0.9", "--seed", "3", "--top-k", "40"), ("--raw",)])
def test_both_modes_say_the_same(run_space, tiny_model_dir, options):
    common = ("chat", "--model", tiny_model_dir, *PROMPT, *FAST, *options, "--json", "-")

    ar, space = (json.loads(run_space(*common, "--mode", mode).stdout) for mode in ("ar", "space"))

    assert ar["token_ids"] == space["token_ids"]
    assert set(ar["accepted_per_step"]) == {1}


def test_a_system_text_a_template_and_raw_change_what_the_model_reads(run_space, tiny_model_dir, tmp_path):
    (tmp_path / "system.txt").write_text("Be brief.\n")
    variants = [(), ("--system", "Be brief."), ("--system-file", "system.txt"), ("--template", r"Q {}\nA"), ("--raw",)]

    done = [
        run_space("chat", "--model", tiny_model_dir, *PROMPT, *FAST, *options, "--json", "-") for options in variants
    ]

    counts = [json.loads(each.stdout)["prompt_tokens"] for each in done]
    assert counts[1] == counts[2] > counts[0] > counts[3] > counts[4]


def test_piped_text_is_a_prompt_or_follows_one(run_space, tiny_model_dir):
    common = ("chat", "--model", tiny_model_dir, *FAST, "--raw", "--json", "-")

    alone = json.loads(run_space(*common, stdin=b"for x in").stdout)
    dashed = json.loads(run_space(*common, "--prompt", "-", stdin=b"for x in").stdout)
    behind = json.loads(run_space(*common, "--prompt", "Go on:", stdin=b"for x in").stdout)
    broken = run_space(*common, stdin=b"for \xff\xed\xa0\x80")

    assert alone["token_ids"] == dashed["token_ids"]
    assert behind["prompt_tokens"] > alone["prompt_tokens"]
    assert broken.returncode == 2
    assert "standard input:1: not UTF-8" in broken.stderr


def test_steps_are_listed(run_space, tiny_model_dir):
    done = run_space("chat", "--model", tiny_model_dir, *PROMPT, *FAST, "--live", "steps", "--stats")

    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert lines[1] == "  + right, kept  - wrong, dropped  > the model's own"
    assert lines[2].startswith("   1  ")
    assert " tokens in " in done.stderr
    assert "\x1b" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "-"], "standard input is empty"),
        ([], "standard input is empty"),
        ([*PROMPT, "--raw", "--template", "{}"], "--raw and --template exclude each other"),
        ([*PROMPT, "--template", "no gap"], "must hold {} once"),
        ([*PROMPT, "--system", "a", "--system-file", "b"], "exclude each other"),
        ([*PROMPT, "--system-file", "absent.txt"], "--system-file absent.txt: No such file"),
        ([*PROMPT, "--load", "absent.json"], "absent.json: No such file"),
        (["--continue", *PROMPT], "newest.json: No such file"),
        ([*PROMPT, "--max-new-tokens", "0"], "Invalid value for '--max-new-tokens'"),
        ([*PROMPT, "--top-p", "0"], "--top-p 0.0: Input should be greater than 0"),
        ([*PROMPT, "--candidates", "0"], "Invalid value for '--candidates': Input should be greater"),
        (["--prompt", "x" * 2000], "leaves no room in the context of 256"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(run_space, tiny_model_dir, tmp_path, arguments, message):
    done = run_space("chat", "--model", tiny_model_dir, *arguments, XDG_STATE_HOME=str(tmp_path))

    assert done.returncode == 2
    assert done.stdout == ""
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_model_without_masks_drafts_from_the_context(run_space, tiny_models, tiny_tokenizer, tmp_path):
    tiny_models["qwen2"].save_pretrained(tmp_path / "plain")
    tiny_tokenizer.save_pretrained(tmp_path / "plain")
    common = ("chat", "--model", tmp_path / "plain", *PROMPT, *FAST)

    space, ar = (json.loads(run_space(*common, "--json", "-", "--mode", mode).stdout) for mode in ("space", "ar"))
    refused = run_space(*common, "--candidates", "3")

    assert space["token_ids"] == ar["token_ids"]
    assert space["steps"] <= ar["steps"]
    assert refused.returncode == 2
    assert "has no masks, and copies as many tokens as pay" in refused.stderr


def test_a_second_answer_copies_from_the_first_unless_that_is_not_wanted(run_space, tiny_model_dir, tmp_path):
    cache = tmp_path / "cache"
    variants = [("--no-memory",), (), ()]

    without, first, second = (
        json.loads(
            run_space(
                "chat", "--model", tiny_model_dir, *PROMPT, *FAST, *options, "--json", "-", XDG_CACHE_HOME=str(cache)
            ).stdout
        )
        for options in variants
    )

    assert first["token_ids"] == second["token_ids"] == without["token_ids"]
    assert second["steps"] < without["steps"]
    assert [len(file.read_bytes()) // 4 for file in cache.rglob("answers-*")] == [2 * len(first["token_ids"]) + 2]


def test_a_corpus_is_copied_from_and_changes_no_answer(run_space, tiny_model_dir, tmp_path):
    common = ("chat", "--model", tiny_model_dir, *PROMPT, *FAST, "--no-memory", "--json", "-")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "answer.txt").write_text(PROMPT[1] * 20)

    without, found, absent = (run_space(*common, *more) for more in ((), ("--corpus", "corpus"), ("--corpus", "no")))

    assert json.loads(found.stdout)["token_ids"] == json.loads(without.stdout)["token_ids"]
    assert (absent.returncode, absent.stderr) == (2, "space: --corpus no: no such file or folder\n")


def test_a_corpus_that_cannot_be_kept_is_told_and_used(run_space, tiny_model_dir, tmp_path):
    (tmp_path / "file").write_text(PROMPT[1] * 20)

    ran = run_space(
        *("chat", "--model", tiny_model_dir, *PROMPT, *FAST, "--no-memory", "--corpus", "file"),
        XDG_CACHE_HOME=str(tmp_path / "file"),
    )

    told = f"the sorted --corpus could not be kept in {tmp_path}/file/space/text: Not a directory"
    assert (ran.returncode, told in ran.stderr) == (0, True)
