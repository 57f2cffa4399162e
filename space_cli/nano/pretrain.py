"""The first stage of nano: a small Llama with random weights learns Python functions, as plain AR.

    python -m space_cli.nano.pretrain

`space train` then makes a SPACE model of it (card.md has the commands).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import TensorDataset
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    get_linear_schedule_with_warmup,
)

from space_cli.nano import recipe_parser
from space_cli.training.chat_format import encode
from space_cli.training.data import read_examples

_WINDOW, _WARMUP_STEPS = 256, 50


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


def windows(files: list[Path], tokenizer: PreTrainedTokenizerBase) -> TensorDataset:
    """Return all examples joined in a shuffled order and cut into windows: (N, 256) int64.

    Windows of one length give a compiled step one shape.
    """
    examples = [example for file in files for example in read_examples(str(file)).examples]
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).tolist()
    limit = tokenizer.model_max_length
    encoded = (encode(examples[number], tokenizer, template=None, max_length=limit).input_ids for number in order)
    # each ends with the end-of-text token that most others begin with
    joined = torch.tensor([id_ for ids in encoded for id_ in ids[ids[0] == tokenizer.bos_token_id :]])
    return TensorDataset(joined[: joined.numel() // _WINDOW * _WINDOW].view(-1, _WINDOW))


def collate(rows: list[tuple[torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return a batch in which every token is learned."""
    ids = torch.stack([row for (row,) in rows])
    return {"input_ids": ids, "labels": ids}


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
        super().__init__([dict(group) for part in self.parts for group in part.param_groups], {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # a closure is never given
        """Step both parts at the rate that the scheduler has set."""
        groups = iter(self.param_groups)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = next(groups)["lr"]
            part.step()


def main() -> None:
    """Train."""
    parser = recipe_parser(__doc__)
    parser.add_argument("--steps", type=int, default=1400, help="of 32 windows")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    args = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.root / "tokenizer")
    model = new_model(tokenizer)
    data = windows([args.root / "functions.jsonl", args.root / "chat.jsonl"], tokenizer)
    print(f"{len(data)} windows of {_WINDOW} tokens, {model.num_parameters() / 1e6:.2f} M parameters", flush=True)
    optimizer = MuonWithAdamW(model, args.learning_rate)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.root / "pretrain"),
            per_device_train_batch_size=32,
            max_steps=args.steps,
            bf16=True,
            use_cpu=True,
            torch_compile=True,
            logging_steps=20,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=0,
            remove_unused_columns=False,
            dataloader_drop_last=True,
        ),
        train_dataset=data,
        data_collator=collate,
        optimizers=(optimizer, get_linear_schedule_with_warmup(optimizer, _WARMUP_STEPS, args.steps)),
    )
    trainer.train()
    model.save_pretrained(args.root / "pretrain")
    tokenizer.save_pretrained(args.root / "pretrain")


if __name__ == "__main__":
    main()
