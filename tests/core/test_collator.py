import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from space_cli.core.collator import IGNORED, SARCollator

MASKS = [296, 297, 298]
PAD = 0


def unpack(batch, row):
    """What every slot of a row holds, where it stands, and what it learns."""
    length = batch["input_ids"].shape[1]
    slots = []
    for slot in range(length - 1):
        target = batch["labels"][row, slot + 1].item()
        slots.append((batch["input_ids"][row, slot].item(), batch["position_ids"][row, slot].item(), target))
    return slots


@st.composite
def examples(draw):
    prompt = draw(st.integers(0, 6))
    response = draw(st.integers(1, 12))
    ids = [10 + i for i in range(prompt + response)]
    return {"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]}


@given(st.lists(examples(), min_size=1, max_size=4), st.integers(0, 3), st.integers(0, 5), st.sampled_from([1, 8]))
def test_every_slot_learns_the_token_after_its_position(features, masks, groups, multiple):
    collator = SARCollator(MASKS, masks, PAD, groups=groups, pad_to_multiple_of=multiple)

    batch = collator(features)

    assert batch["input_ids"].shape[1] % multiple == 0
    for row, feature in enumerate(features):
        labels = feature["labels"]
        for _, position, target in unpack(batch, row):
            if target != IGNORED:
                assert target == labels[position + 1]


@given(examples(), st.integers(1, 3), st.integers(1, 5))
def test_tokens_learn_the_whole_response_and_nothing_of_the_prompt(feature, masks, groups):
    batch = SARCollator(MASKS, masks, PAD, groups=groups)([feature])

    slots = unpack(batch, 0)[: len(feature["input_ids"])]

    assert [target for _, _, target in slots] == [*feature["labels"][1:], IGNORED]


@given(examples(), st.integers(1, 3), st.integers(1, 5))
def test_a_mask_sees_its_prefix_and_its_own_group_alone(feature, masks, groups):
    batch = SARCollator(MASKS, masks, PAD, groups=groups)([feature])
    size, length = len(feature["input_ids"]), batch["input_ids"].shape[1] - 1
    visible = batch["attention_mask"][0, 0]

    for slot in range(size, length):
        in_group = (slot - size) % masks
        anchor = batch["position_ids"][0, slot].item() - in_group - 1
        expected = set(range(anchor + 1)) | set(range(slot - in_group, slot + 1))

        assert batch["input_ids"][0, slot].item() == MASKS[in_group]
        assert set(visible[slot].nonzero().flatten().tolist()) == expected
    assert not visible[:size, size:].any()


@given(examples(), st.integers(1, 3), st.integers(1, 20))
def test_each_group_has_something_to_learn_inside_the_response(feature, masks, groups):
    batch = SARCollator(MASKS, masks, PAD, groups=groups)([feature])
    size = len(feature["input_ids"])
    targets = [target for _, _, target in unpack(batch, 0)[size:]]

    eligible = max(0, sum(label != IGNORED for label in feature["labels"][1:]) - 1)

    assert len(targets) == masks * min(groups, eligible)
    for start in range(0, len(targets), masks):
        learnt = [target != IGNORED for target in targets[start : start + masks]]
        assert learnt[0]
        assert learnt == sorted(learnt, reverse=True)


def test_masks_do_not_learn_across_a_prompt_between_two_responses():
    ids = list(range(10, 20))
    labels = [IGNORED, 11, 12, 13, IGNORED, IGNORED, 16, 17, 18, 19]
    batch = SARCollator(MASKS, 3, PAD, groups=99)([{"input_ids": ids, "labels": labels}])

    learnt = [
        (position, target) for token, position, target in unpack(batch, 0)[10:] if target != IGNORED and token in MASKS
    ]

    assert set(learnt) <= {(1, 12), (2, 13), (6, 17), (7, 18), (8, 19)}


def test_paper_form_cuts_the_example_and_appends_one_group():
    feature = {"input_ids": list(range(10, 30))}
    lengths = set()

    for seed in range(20):
        batch = SARCollator([299], 2, PAD, mask_layout="paper", p_sar=1.0, seed=seed)([feature])
        ids = batch["input_ids"][0].tolist()
        cut = ids.index(299)
        assert ids[:cut] == feature["input_ids"][:cut]
        assert ids[cut : cut + 2] == [299, 299]
        assert batch["position_ids"][0, cut].item() == cut
        lengths.add(cut)

    assert len(lengths) > 5


def test_paper_form_leaves_the_share_of_examples_that_p_sar_says():
    collator = SARCollator([299], 2, PAD, mask_layout="paper", p_sar=0.5, seed=3)

    with_group = sum(
        bool((collator([{"input_ids": list(range(10, 30))}])["input_ids"] == 299).any()) for _ in range(400)
    )

    assert 150 < with_group < 250


def test_the_same_seed_draws_the_same_anchors():
    feature = {"input_ids": list(range(10, 60))}

    first, second = (SARCollator(MASKS, 3, PAD, groups=4, seed=5)([feature]) for _ in range(2))

    assert all(torch.equal(first[name], second[name]) for name in first)


def test_wrong_forms_and_empty_examples_are_refused():
    with pytest.raises(ValueError, match="mask_layout"):
        SARCollator(MASKS, 3, PAD, mask_layout="other")
    with pytest.raises(ValueError, match="tokens"):
        SARCollator(MASKS, 3, PAD)([{"input_ids": []}])


def test_token_rows_give_the_loss_of_plain_training(tiny_models):
    model = tiny_models["llama"]
    ids = [5, 9, 33, 70, 12, 41, 8, 90]

    batch = SARCollator(MASKS, 3, PAD, groups=0)([{"input_ids": ids}])
    plain = model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss

    assert torch.allclose(model(**batch).loss, plain, atol=1e-5)


def test_mask_logits_in_training_are_those_of_decoding(tiny_models):
    model, ids, anchor = tiny_models["llama"], [5, 9, 33, 70, 12, 41, 8, 90], 4
    batch = SARCollator(MASKS, 3, PAD, groups=99)([{"input_ids": ids}])
    batch.pop("labels")

    logits = model(**batch).logits[0]
    alone = model(input_ids=torch.tensor([[*ids[: anchor + 1], *MASKS]])).logits[0, -3:]

    first = len(ids) + 3 * anchor
    assert torch.allclose(logits[first : first + 3], alone, atol=1e-4)


def test_batch_goes_straight_into_the_trainer(tiny_models, tmp_path):
    from copy import deepcopy

    from transformers import Trainer, TrainingArguments

    model = deepcopy(tiny_models["llama"])
    rows = [{"input_ids": list(range(10, 40))}, {"input_ids": list(range(50, 70))}] * 4
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, use_cpu=True, report_to="none",
        remove_unused_columns=False, disable_tqdm=True, learning_rate=1e-3, dataloader_pin_memory=False,
    )  # fmt: skip

    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=SARCollator(MASKS, 3, PAD))
    result = trainer.train()

    assert result.global_step == 3
    assert result.training_loss > 0
