import json

import torch
from transformers import LlamaConfig, LlamaForCausalLM, get_linear_schedule_with_warmup

from space_cli.nano import tokenizer
from space_cli.nano.pretrain import MuonWithAdamW, collate, new_model, windows


def test_every_function_stands_in_the_windows_between_ends_of_text(tmp_path):
    pairs = [(f"def f{n}(a):\n", f"    return a + {n}\n") for n in range(200)]
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    (tmp_path / "functions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = tokenizer.train(prompt + completion for prompt, completion in pairs)

    data = windows([tmp_path / "functions.jsonl"], own)

    ids = torch.cat([row for (row,) in data])
    texts = own.decode(ids).split(tokenizer.END)
    assert all(row.shape == (256,) for (row,) in data)
    assert set(texts[:-1]) <= {prompt + completion for prompt, completion in pairs}
    assert len(texts) > len(ids) / 40
    batch = collate([data[0], data[1]])
    assert batch["input_ids"].shape == (2, 256)
    assert torch.equal(batch["labels"], batch["input_ids"])


def test_nano_has_the_size_it_is_said_to_have():
    own = tokenizer.train(["def f(a):\n    return a\n"], vocabulary=300)

    assert 4.5e6 < new_model(own).num_parameters() < 6e6


def test_both_optimizers_follow_the_schedule_after_their_state_was_loaded():
    """Accelerate loads an optimizer's own state into it, which puts other dictionaries in place of its groups."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
    optimizer = MuonWithAdamW(model, 1e-2)
    schedule = get_linear_schedule_with_warmup(optimizer, 2, 10)
    optimizer.load_state_dict(optimizer.state_dict())
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}

    ids = torch.arange(32).view(2, 16)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        schedule.step()

    # the first step of the warm-up has rate 0, the second has not
    matrices = {name for name in before if before[name].ndim == 2}
    assert all(
        not torch.equal(before[name], parameter) for name, parameter in model.named_parameters() if name in matrices
    )
