"""Two passes give the masks what one pass over the whole block gives them; the fused pieces are the plain ones."""

import pytest
import torch
from tiny import lively, tiny_configs
from torch.nn import functional
from transformers import AutoModelForCausalLM

from space_cli.core.collator import SARCollator
from space_cli.models.adapter import attach_adapter, low_rank, trained_state
from space_cli.training.fused import LowRankLinear, fuse_low_rank_layers, training_attention
from space_cli.training.two_pass import MaskLoss, TwoPassCollator, TwoPassTrainer

MASKS, VOCABULARY = 3, 300
EXAMPLES = [
    {"input_ids": list(range(5, 25)), "labels": [-100] * 6 + list(range(11, 25)), "example_index": 0},
    {"input_ids": list(range(40, 52)), "labels": [-100] * 3 + list(range(43, 52)), "example_index": 1},
]


def adapted(family="llama", bigram=0):
    model = lively(AutoModelForCausalLM.from_config(tiny_configs()[family], dtype=torch.float32))
    ids = attach_adapter(model, MASKS, low_rank(model, 4), bigram=bigram)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model, ids


def collator(ids):
    return SARCollator(mask_token_ids=ids, masks_per_group=MASKS, pad_token_id=0, groups=5, seed=3)


def trainer(model, ids, tmp_path, loss):
    from transformers import TrainingArguments

    from space_cli.models.checkpoint import SpaceConfig

    space = SpaceConfig(method="adapter", mask_token_ids=ids, candidates=MASKS, masks_per_group=MASKS, base_model="x")
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    return TwoPassTrainer(
        loss=loss, collator=collator(ids), space=space, mask_loss_weight=1, model=model, args=arguments
    )


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("loss", ["kl", "ce"])
@pytest.mark.parametrize("bigram", [0, 3])
def test_loss_and_gradients_are_those_of_one_pass_over_the_block(tmp_path, family, loss, bigram):
    model, ids = adapted(family, bigram)
    two_pass = trainer(model, ids, tmp_path, loss)

    model.eval()
    found = two_pass.compute_loss(model, TwoPassCollator(collator(ids))(EXAMPLES))
    found.backward()
    of_two = gradients(model)

    # the oracle: the whole block at once, the base's distribution at a mask's position that of the text slot there
    model.zero_grad()
    batch = collator(ids)(EXAMPLES)
    mask = torch.zeros(batch["attention_mask"].shape).masked_fill_(
        ~batch["attention_mask"], torch.finfo(torch.float32).min
    )
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], attention_mask=mask).logits
    total, count = torch.zeros(()), 0
    for row, example in enumerate(EXAMPLES):
        tokens = len(example["input_ids"])
        for slot in range(tokens, batch["input_ids"].shape[1] - 1):
            label, position = int(batch["labels"][row, slot + 1]), int(batch["position_ids"][row, slot])
            if label < 0:
                continue
            depth = (slot - tokens) % MASKS
            wanted = logits[row, position].detach().softmax(-1) if loss == "kl" else torch.tensor(label)
            guess = logits[row, slot]
            loss_of_mask = functional.cross_entropy(guess[None], wanted[None])
            if bigram:
                layer = model.get_input_embeddings().bigram
                rows = model.get_input_embeddings()(torch.arange(VOCABULARY)).detach()
                rows = rows / (rows.pow(2).mean(-1, keepdim=True) + torch.finfo(rows.dtype).eps).sqrt()
                before = functional.silu(rows[example["input_ids"][position]] @ layer.inner) @ layer.previous
                tied = guess + rows @ layer.following @ (before * layer.gates[depth])
                loss_of_mask = (loss_of_mask + functional.cross_entropy(tied[None], wanted[None])) / 2
            total = total + 0.8**depth * loss_of_mask
            count += 1
    expected = total / count
    expected.backward()

    assert torch.allclose(found, expected, atol=1e-5)
    for name, gradient in gradients(model).items():
        assert torch.allclose(of_two[name], gradient, atol=1e-5), name


def test_only_what_is_trained_gets_a_gradient(tmp_path):
    model, ids = adapted(bigram=2)

    trainer(model, ids, tmp_path, "kl").compute_loss(model, TwoPassCollator(collator(ids))(EXAMPLES)).backward()

    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == len(trained_state(model))


@pytest.mark.parametrize("bias", [False, True])
def test_a_fused_layer_is_the_layer(bias):
    generator = torch.Generator().manual_seed(0)
    inputs, weight, down, up = (
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 5, 6), (7, 6), (3, 6), (7, 3))
    )
    offset = torch.randn(7, dtype=torch.float64) if bias else None
    frozen = weight.detach()

    assert torch.autograd.gradcheck(
        lambda inputs, down, up: LowRankLinear.apply(inputs, frozen, frozen.t().contiguous(), offset, down, up, 2.0),
        (inputs, down, up),
        check_backward_ad=True,
    )
    expected = functional.linear(inputs, frozen, offset) + 2 * inputs @ down.t() @ up.t()
    assert torch.allclose(LowRankLinear.apply(inputs, frozen, frozen.t(), offset, down, up, 2.0), expected)


def test_text_goes_through_unfused_layers_untouched():
    model, ids = adapted()
    text = torch.tensor([[5, 6, 7, 8]])
    before = model(input_ids=text).logits

    fuse_low_rank_layers(model)

    assert torch.equal(model(input_ids=text).logits, before)
    mixed = torch.tensor([[5, 6, ids[0], ids[1]]])
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=mixed).logits).all()


def test_attention_of_training_is_sdpa():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, 7, 8, generator=generator, requires_grad=True)
    key, value = (torch.randn(2, 2, 11, 8, generator=generator) for _ in range(2))
    mask = torch.zeros(2, 1, 7, 11).masked_fill_(torch.rand(2, 1, 7, 11, generator=generator) < 0.4, -1e9)

    found, _ = training_attention(torch.nn.Module(), query, key, value, mask, scaling=0.3)

    keys, values = (states.repeat_interleave(3, dim=1) for states in (key, value))
    expected = functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=0.3)
    assert torch.allclose(found, expected.transpose(1, 2), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_teacher", [False, True])
def test_the_loss_of_masks_is_cross_entropy(dtype, with_teacher):
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(20, VOCABULARY, generator=generator)).to(dtype).requires_grad_()
    teacher = torch.randn(9, VOCABULARY, generator=generator)
    place, labels = torch.randint(9, (20,), generator=generator), torch.randint(VOCABULARY, (20,), generator=generator)
    weights = torch.rand(20, generator=generator)
    given = logits.detach().clone()

    total, losses, hits = MaskLoss.apply(logits, labels, weights, teacher, place if with_teacher else None)
    total.backward()

    plain = given.float().requires_grad_()
    targets = teacher.softmax(-1)[place] if with_teacher else labels
    expected = functional.cross_entropy(plain, targets, reduction="none")
    (expected * weights).sum().backward()
    assert torch.equal(logits, given)
    assert torch.allclose(losses, expected, atol=1e-5)
    assert torch.allclose(logits.grad.float(), plain.grad, atol=1e-6 if dtype == torch.float32 else 4e-3)
    assert torch.equal(hits.bool(), given.argmax(-1) == labels)
