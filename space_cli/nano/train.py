"""One training stage of nano: packed windows in, a Hugging Face model folder out.

The recipe is a row of such stages (card.md lists them with their figures). Each starts from the weights of an earlier
one, so training can go on whenever there is time::

    python -m space_cli.nano.train --data functions.jsonl --data plain.jsonl --output pretrain --minutes 45
    python -m space_cli.nano.train --init pretrain --data functions.jsonl --groups 12 --decay --output sar --minutes 15
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
)

from space_cli.core.collator import IGNORED, SARCollator
from space_cli.models.checkpoint import SpaceConfig
from space_cli.training.trainer import SARTrainer

MASKS = 5
CHAT_REQUEST = "Complete the following Python function.\n\n"


def new_model(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """Return nano with random weights."""
    end = tokenizer.eos_token_id
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=end,
            eos_token_id=end,
            pad_token_id=end,
        )
    )


def mask_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return nano's distinct mask ids, one per mask of a group."""
    return [tokenizer.get_vocab()[f"<|mask{j}|>"] for j in range(1, MASKS + 1)]


def encode(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, *, chat: bool) -> tuple[list[int], list[int]]:
    """Return ids and labels of one document: `text`, or `prompt` and `completion` (plain or as a chat turn)."""
    end = tokenizer.eos_token_id
    if "text" in row:
        ids = [*tokenizer(row["text"], add_special_tokens=False)["input_ids"], end]
        return ids, ids
    prompt = row["prompt"]
    if chat:
        turn = [{"role": "user", "content": CHAT_REQUEST + prompt}]
        prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    completion = row.get("completion_ids") or tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
    ids = [*prompt_ids, *completion, *([] if row.get("unfinished") else [end])]
    return ids, [IGNORED] * len(prompt_ids) + ids[len(prompt_ids) :]


class Windows(Dataset[dict[str, list[int]]]):
    """Documents joined and cut into windows of one length, so that a compiled step sees one shape."""

    def __init__(
        self,
        files: list[Path],
        tokenizer: PreTrainedTokenizerBase,
        *,
        window: int,
        chat_share: float,
        prompt_loss: bool,
        seed: int,
        max_tokens: int,
    ) -> None:
        documents = [line for file in files for line in file.read_text("utf-8").splitlines()]
        draw = random.Random(seed)
        draw.shuffle(documents)
        ids: list[int] = []
        labels: list[int] = []
        for line in documents:
            document, targets = encode(json.loads(line), tokenizer, chat=draw.random() < chat_share)
            ids += [tokenizer.bos_token_id, *document] if tokenizer.bos_token_id != tokenizer.eos_token_id else document
            labels += document if prompt_loss else targets
            if len(ids) >= max_tokens:
                break
        starts = list(range(0, len(ids) - window, window))
        draw.shuffle(starts)
        self._windows = [(ids[start : start + window], labels[start : start + window]) for start in starts]

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        ids, labels = self._windows[index]
        return {"input_ids": ids, "labels": labels}


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the matrices inside the layers, AdamW for everything else; torch's own two, stepped together."""

    def __init__(self, model: PreTrainedModel, lr: float) -> None:
        inner = [
            p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name and "lm_head" not in name
        ]
        known = {id(p) for p in inner}
        outer = [p for p in model.parameters() if id(p) not in known]
        self.parts = [
            torch.optim.Muon(inner, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(outer, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        # the parts read their learning rate from the very groups that the scheduler writes to
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # a closure is never given
        """Step both parts."""
        for part in self.parts:
            part.step()


class Deadline(TrainerCallback):
    """Stop after a number of minutes; with `decay` the learning rate falls linearly to a tenth by then."""

    def __init__(self, minutes: float, optimizer: MuonWithAdamW, *, decay: bool, warmup_steps: int) -> None:
        self.seconds, self.optimizer, self.decay, self.warmup_steps = minutes * 60, optimizer, decay, warmup_steps
        self.peak = optimizer.param_groups[0]["lr"]
        self.started = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.started = time.monotonic()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the learning rate of this step."""
        left = max(0.0, 1 - (time.monotonic() - self.started) / self.seconds)
        lr = (
            self.peak
            * min(1.0, (state.global_step + 1) / self.warmup_steps)
            * (0.1 + 0.9 * left if self.decay else 1.0)
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop when the time is over."""
        if time.monotonic() - self.started > self.seconds:
            control.should_training_stop = True


def held_out(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, file: Path, *, documents: int = 300
) -> dict[str, Any]:
    """Measure bits per byte of completions and top-1 accuracy of each mask on the first held-out documents."""
    collator = SARCollator(mask_token_ids(tokenizer), MASKS, tokenizer.pad_token_id, groups=12)
    bits = num_bytes = 0.0
    hits, seen = [0] * MASKS, [0] * MASKS
    for row in _rows(file, documents):
        ids, labels = encode(row, tokenizer, chat=False)
        if len(ids) > 600:
            continue
        batch = collator([{"input_ids": ids, "labels": labels}])
        targets = batch.pop("labels")[0, 1:]
        with torch.inference_mode():
            logits = model(**batch).logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
        bits += loss[: len(ids)].sum().item() / 0.6931471805599453
        num_bytes += len(row["completion"].encode())
        right = (logits.argmax(-1) == targets).tolist()
        for slot in range(len(ids), len(targets)):
            if targets[slot] != IGNORED:
                hits[(slot - len(ids)) % MASKS] += right[slot]
                seen[(slot - len(ids)) % MASKS] += 1
    return {
        "bits_per_byte": bits / num_bytes,
        "mask_accuracy": [round(h / max(1, s), 4) for h, s in zip(hits, seen, strict=True)],
    }


def _rows(file: Path, count: int) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        for _, line in zip(range(count), lines, strict=False):
            yield json.loads(line)


def main() -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, default=Path("build/nano"), help="folder the other paths are relative to")
    parser.add_argument("--init", help="folder of the weights to go on from; random weights without it")
    parser.add_argument("--data", action="append", required=True, help="JSON lines: text, or prompt and completion")
    parser.add_argument("--output", required=True)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--decay", action="store_true")
    parser.add_argument("--groups", type=int, default=0, help="mask groups per window; 0 trains AR alone")
    parser.add_argument("--window", type=int, default=255)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--chat-share", type=float, default=0.0, help="share of functions written as a chat turn")
    parser.add_argument("--prompt-loss", action="store_true", help="prompts carry loss too, as in pretraining")
    parser.add_argument("--max-tokens", type=int, default=40_000_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.root / "tokenizer")
    model = AutoModelForCausalLM.from_pretrained(args.root / args.init) if args.init else new_model(tokenizer)
    windows = Windows(
        [args.root / name for name in args.data],
        tokenizer,
        window=args.window,
        chat_share=args.chat_share,
        prompt_loss=args.prompt_loss,
        seed=args.seed,
        max_tokens=args.max_tokens,
    )
    print(
        f"{len(windows)} windows of {args.window} tokens, {model.num_parameters() / 1e6:.2f} M parameters", flush=True
    )
    optimizer = MuonWithAdamW(model, args.lr)
    output = args.root / args.output
    space = SpaceConfig(
        method="full", mask_token_ids=mask_token_ids(tokenizer), candidates=MASKS, masks_per_group=MASKS
    )
    trainer = SARTrainer(
        space=space,
        mask_loss_weight=1.0,
        processing_class=tokenizer,
        model=model,
        args=TrainingArguments(
            output_dir=str(output),
            per_device_train_batch_size=args.batch,
            num_train_epochs=100,
            bf16=True,
            use_cpu=True,
            torch_compile=True,
            logging_steps=20,
            save_steps=200,
            save_total_limit=1,
            save_only_model=True,
            report_to="none",
            disable_tqdm=True,
            seed=args.seed,
            remove_unused_columns=False,
        ),
        train_dataset=windows,
        collator=SARCollator(
            mask_token_ids(tokenizer),
            MASKS if args.groups else 0,
            tokenizer.pad_token_id,
            groups=args.groups,
            seed=args.seed,
        ),
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
        callbacks=[Deadline(args.minutes, optimizer, decay=args.decay, warmup_steps=50)],
    )
    trainer.train()
    model.eval()  # type: ignore[no-untyped-call]
    measured = held_out(model, tokenizer, args.root / "heldout.jsonl")
    report = {
        "steps": trainer.state.global_step,
        "tokens": trainer.state.global_step * args.batch * args.window,
        **measured,
    }
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    told = {"arguments": {k: str(v) for k, v in vars(args).items() if k != "root"}, **report}
    space.model_copy(update={"training": told}).save(output)
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
