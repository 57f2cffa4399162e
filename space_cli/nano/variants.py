"""Compare ways of training on one base: the same data and number of steps, one setting changed at a time.

    python -m space_cli.nano.variants

Each is a run of `space train`; all share the base's own answers. Prints a table in Markdown.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from space_cli.models.checkpoint import SpaceConfig
from space_cli.nano import recipe_parser
from space_cli.training.run import ANSWERS_FILE, LOG_FILE

VARIANTS = {
    "8 groups, 5 distinct masks, all weights, with own answers": (),
    "one group per example (paper)": ("--form", "paper"),
    "one mask id for all (paper)": ("--masks", "single"),
    "adapter": ("--method", "adapter"),
    "k = 3": ("--candidates", "3"),
    "k = 8": ("--candidates", "8"),
    "without own answers": ("--distill", "off"),
}
_COMMON = shlex.split(
    "--method full --learning-rate 1e-3 --batch-size 16 --max-length 256 --answer-tokens 128 --dtype bfloat16"
    " --distill 800 --answer-batch-size 64 --epochs 9 --held-out 48 --save-steps 1000 --overwrite --quiet"
)


def main() -> None:
    """Train every variant that has not been trained yet, and print the table."""
    parser = recipe_parser(__doc__)
    parser.add_argument("--steps", type=int, default=120)
    args = parser.parse_args()
    base, data, folder = args.root / "pretrain", args.root / "functions.jsonl", args.root / "variants"
    print("| training | tokens per step, all / plain | repetitive | AR loss | seconds of steps | tokens/s |")
    print("| --- | --- | --- | --- | --- | --- |")
    first: Path | None = None
    for number, (name, options) in enumerate(VARIANTS.items()):
        output = folder / str(number)
        if not (output / LOG_FILE).is_file():
            output.mkdir(parents=True, exist_ok=True)
            if first is not None:
                shutil.copy(first / ANSWERS_FILE, output)
            common = ("--model", base, "--data", data, "--output", output, "--limit", "4000", "--max-steps", args.steps)
            command = [sys.executable, "-m", "space_cli", "train", *map(str, common), *_COMMON, *options]
            subprocess.run(command, check=True)
        first = first or output
        print(_row(name, output), flush=True)


def _row(name: str, output: Path) -> str:
    """Return the line of a trained variant."""
    after = SpaceConfig.load(output).acceptance["after"]
    log: list[dict[str, Any]] = [json.loads(line) for line in (output / LOG_FILE).read_text("utf-8").splitlines()]
    seconds = next(row["train_runtime"] for row in log if "train_runtime" in row)
    rates = sorted(row["tokens_per_second"] for row in log if "tokens_per_second" in row)
    plain = after["tokens_per_step_plain"]
    return (
        f"| {name} | {after['tokens_per_step']:.2f} / {'-' if plain is None else format(plain, '.2f')}"
        f" | {after['repetitive']} of {after['prompts']} | {after['answer_loss']:.3f} | {seconds:.0f}"
        f" | {rates[len(rates) // 2]:.0f} |"
    )


if __name__ == "__main__":
    main()
