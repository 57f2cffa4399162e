"""Shared fixtures: an offline environment, tiny random models of real architectures, the command in a subprocess."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import running
from hypothesis import HealthCheck, settings
from tiny import MASK_IDS, VOCABULARY, tiny_configs, tiny_model

# libraries read these when they are imported; the folder goes with the process
_home = tempfile.TemporaryDirectory(prefix="space-tests-")
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": _home.name}
settings.register_profile(
    "space", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("space")


@pytest.fixture(scope="session")
def clean_env(tmp_path_factory):
    """The environment of a new user: offline, an empty cache, no terminal settings."""
    dropped = ("FORCE_COLOR", "NO_COLOR", "SPACE_DEBUG", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    homes = ("HF_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME")
    own = {name: str(tmp_path_factory.mktemp("home")) for name in homes}
    return environment | own | {"COLUMNS": "80", "TERM": "xterm-256color"}


@pytest.fixture
def run_space(clean_env, tmp_path):
    """Run `space` with arguments in an empty folder, in this process: a tenth of the time a new interpreter takes."""
    return _runner(running.here, clean_env, tmp_path)


@pytest.fixture
def space(run_space):
    """Run `space` with arguments that may be any bytes and something piped in."""

    def run(*arguments, text=b"", **env):
        return run_space(*arguments, stdin=text, **env)

    return run


@pytest.fixture
def run_space_apart(clean_env, tmp_path):
    """Run `space` in an interpreter of its own, for what only a whole process shows."""
    return _runner(running.apart, clean_env, tmp_path)


@pytest.fixture(scope="session")
def run_space_once(clean_env, tmp_path_factory):
    """Run `space` for fixtures that outlive a test."""
    return _runner(running.apart, clean_env, tmp_path_factory.mktemp("once"))


def _runner(how, environment, folder):
    def run(*arguments, stdin=b"", **env):
        return how(arguments, env=environment | env, cwd=folder, stdin=stdin)

    return run


@pytest.fixture
def stop_space(clean_env):
    """Start `space`, send it a signal once a text shows on standard error; return the process and what it printed."""

    def run(*arguments, at, signal_number=signal.SIGINT):
        # a job in the background of a script inherits a SIGINT that is ignored, and so would the command
        with subprocess.Popen(
            [sys.executable, "-u", "-m", "space_cli", *map(str, arguments)],
            env=clean_env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ) as process:
            try:
                for line in process.stderr:
                    if at in line:
                        break
                os.kill(process.pid, signal_number)
                out, err = process.communicate(timeout=60)
            finally:
                process.kill()
        return process, out, err

    return run


@pytest.fixture(scope="session")
def tiny_models():
    """Tiny random float32 models by family."""
    import torch

    torch.set_num_threads(1)
    return {family: tiny_model(family) for family in tiny_configs()}


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A byte-level tokenizer with a few merges, three mask tokens and an end of text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    masks = [f"<|mask{j}|>" for j in (1, 2, 3)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 4,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["def add(a, b):\n    return a + b\n" * 20, "for x in range(10): print(x)"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    fast.add_tokens([f"<|unused{i}|>" for i in range(MASK_IDS[0] - len(fast))])
    fast.add_special_tokens({"additional_special_tokens": masks})
    assert tuple(fast.convert_tokens_to_ids(masks)) == MASK_IDS
    return fast


@pytest.fixture(scope="session")
def tiny_model_dir(tiny_models, tiny_tokenizer, tmp_path_factory):
    """A SPACE checkpoint folder of a tiny random Llama with k = m = 3."""
    folder = tmp_path_factory.mktemp("tiny-space")
    tiny_models["llama"].save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    config = {"format": 1, "method": "full", "mask_token_ids": MASK_IDS, "candidates": 3, "masks_per_group": 3}
    (folder / "space_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def prompts_file(tmp_path) -> Path:
    """A JSON Lines suite of two prompts."""
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "def add(a, b):\n"}, {"prompt": "for x in", "task_id": "loop"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
