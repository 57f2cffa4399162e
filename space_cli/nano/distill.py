"""Self-distillation data of nano: its own answers to training prompts, so that masks learn what it will really say.

    python -m space_cli.nano.distill --init sar --prompts functions.jsonl --count 6000 --output distill.jsonl

Two thirds of the answers are greedy, one third is sampled at temperature 0.8. Repetitive answers (tokens over distinct
tokens above 3.5) are left out: they would teach the model to loop.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from space_cli.core.stream import is_repetitive

_BATCH = 64
_MAX_PROMPT_TOKENS = 256
_MAX_NEW_TOKENS = 112


def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], *, temperature: float
) -> list[list[int]]:
    """Return one answer per prompt, the end of text included where the model reached it."""
    end = tokenizer.eos_token_id
    options: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {}
    config = GenerationConfig(max_new_tokens=_MAX_NEW_TOKENS, eos_token_id=end, pad_token_id=end, **options)
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    with torch.autocast("cpu", torch.bfloat16):
        output = model.generate(**batch, generation_config=config)  # type: ignore[operator]  # mixed in unseen by mypy
    rows = output[:, batch["input_ids"].shape[1] :].tolist()
    return [row[: row.index(end) + 1] if end in row else row for row in rows]


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path("build/nano"), help="folder the other paths are relative to")
    parser.add_argument("--init", required=True, help="folder of the model that answers")
    parser.add_argument("--prompts", required=True, help="JSON lines with `prompt`")
    parser.add_argument("--output", required=True)
    parser.add_argument("--count", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.root / args.init)
    model = AutoModelForCausalLM.from_pretrained(args.root / args.init).eval()
    lines = (args.root / args.prompts).read_text("utf-8").splitlines()
    random.Random(args.seed).shuffle(lines)
    prompts = [json.loads(line)["prompt"] for line in lines[: args.count * 2]]
    lengths = {prompt: len(tokenizer(prompt)["input_ids"]) for prompt in prompts}
    prompts = [prompt for prompt in prompts if lengths[prompt] <= _MAX_PROMPT_TOKENS][: args.count]
    # prompts of like length share a batch, and a batch in three is sampled
    prompts.sort(key=lambda prompt: lengths[prompt])
    batches = [prompts[start : start + _BATCH] for start in range(0, len(prompts), _BATCH)]
    random.Random(args.seed).shuffle(batches)
    started, kept, tokens = time.monotonic(), 0, 0
    part = args.root / (args.output + ".part")
    with part.open("w", encoding="utf-8") as file:
        for number, batch in enumerate(batches):
            rows = answers(model, tokenizer, batch, temperature=0.8 if number % 3 == 2 else 0.0)
            for prompt, ids in zip(batch, rows, strict=True):
                if len(ids) > 1 and not is_repetitive(ids):
                    finished = ids[-1] == tokenizer.eos_token_id
                    row = {
                        "prompt": prompt,
                        "completion_ids": ids[:-1] if finished else ids,
                        "unfinished": not finished,
                    }
                    file.write(json.dumps(row) + "\n")
                    kept, tokens = kept + 1, tokens + len(ids)
            if number % 10 == 9:
                print(f"{(number + 1) * _BATCH} prompts, {kept} kept, {time.monotonic() - started:.0f} s", flush=True)
    part.replace(args.root / args.output)
    print(json.dumps({"prompts": len(prompts), "kept": kept, "tokens": tokens, "seconds": time.monotonic() - started}))


if __name__ == "__main__":
    main()
