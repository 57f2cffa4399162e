"""Planted bugs: each must make the command fail."""

import json
from itertools import count

import numpy as np
import pytest
import torch

from space_cli.cli.app import run
from space_cli.core import cache, decoder, engine, sampling
from space_cli.core.block import Block
from space_cli.models import support

FAST = ("--dtype", "float32", "--max-new-tokens", "24", "--quiet", "--json", "-")


@pytest.fixture
def check(tiny_model_dir, prompts_file, capsys, monkeypatch):
    """Run the command in this process, where bugs can be planted; return its exit code and record."""
    # the probe at load refuses a model for most of these bugs; here the command itself has to find them
    monkeypatch.setattr(support, "check_block", lambda *_: None)

    def run_command(*arguments):
        code = run(["verify-lossless", "--model", str(tiny_model_dir), "--suite", str(prompts_file), *FAST, *arguments])
        return code, json.loads(capsys.readouterr().out)

    return run_command


def wrong_position_offset(monkeypatch):
    """Candidates stand one position too far."""
    offsets = Block.offsets.func

    def shifted(self):
        return tuple(offset + (0 < slot < self.num_tokens) for slot, offset in enumerate(offsets(self)))

    monkeypatch.setattr(Block, "offsets", property(shifted))


def a_group_sees_another(monkeypatch):
    """Every mask group sees the group behind the head."""
    visibility = Block.visibility.func

    def leaking(self):
        visible = np.array(visibility(self))
        for anchor in self.anchors[1:]:
            visible[np.ix_(self.group(anchor), self.group(0))] = True
        return visible

    monkeypatch.setattr(Block, "visibility", property(leaking))


def tokens_see_masks(monkeypatch):
    """Candidates see the masks behind the head."""
    visibility = Block.visibility.func

    def leaking(self):
        visible = np.array(visibility(self))
        visible[np.ix_(range(1, self.num_tokens), self.group(0))] = True
        return visible

    monkeypatch.setattr(Block, "visibility", property(leaking))


def one_candidate_too_many(monkeypatch):
    """The first wrong candidate is accepted too."""
    verify = decoder._verify

    def generous(step_logits, block, candidates, tokens):
        path, emitted = verify(step_logits, block, candidates, tokens)
        children = block.children[path[-1]]
        if not children:
            return path, emitted
        wrong = candidates[children[0] - 1]
        history = [*tokens, *emitted[:-1], wrong]
        return [*path, children[0]], [*emitted[:-1], wrong, step_logits.token(children[0], history)]

    monkeypatch.setattr(decoder, "_verify", generous)


def rollback_one_too_far(monkeypatch):
    """A step that accepted something forgets its last committed token."""
    commit = cache.KVCache.commit

    def forgetful(self, start, slots):
        commit(self, start, slots)
        if len(slots) > 1:
            self.crop(start + len(slots) - 1)

    monkeypatch.setattr(cache.KVCache, "commit", forgetful)


def rollback_one_short(monkeypatch):
    """The first rejected slot of an answer stays in the cache."""
    crop, slipped = cache.KVCache.crop, set()

    def lazy(self, length):
        nonlocal slipped
        slips = id(self.capacity) not in slipped and length < self.length
        crop(self, length + slips)
        slipped |= {id(self.capacity)} if slips else set()

    monkeypatch.setattr(cache.KVCache, "crop", lazy)


def noise_keyed_by_step(monkeypatch):
    """The noise counts draws instead of positions."""
    at, step = sampling._Noise.at, count()
    monkeypatch.setattr(sampling._Noise, "at", lambda self, _, *where: at(self, next(step), *where))


def greedy_instead_of_sampled(monkeypatch):
    """The noise is forgotten, in AR and SPACE alike."""
    monkeypatch.setattr(sampling._Noise, "at", lambda _, __, size, ___: torch.zeros(size))


def masks_in_wrong_order(monkeypatch):
    """The ids of a group's masks are swapped."""
    ids = Block.mask_token_ids

    def reversed_groups(self, mask_token_ids):
        return ids(self, list(mask_token_ids)[::-1])

    monkeypatch.setattr(engine.Block, "mask_token_ids", reversed_groups)


MIXED, SAMPLED = ("--drafts", "mixed"), ("--temperature", "1.5", "--draws", "200")


@pytest.mark.parametrize(
    ("bug", "options", "found_by"),
    [
        (wrong_position_offset, MIXED, {"ar", "hf"}),
        (a_group_sees_another, MIXED, {"drafts"}),
        (tokens_see_masks, MIXED, {"ar", "hf"}),
        (one_candidate_too_many, (), {"ar", "hf"}),
        (one_candidate_too_many, MIXED, {"ar", "hf"}),
        (rollback_one_too_far, MIXED, {"ar", "hf"}),
        (rollback_one_short, MIXED, {"ar", "hf"}),
        (noise_keyed_by_step, SAMPLED, {"ar"}),
        (greedy_instead_of_sampled, SAMPLED, {"distribution"}),
        (masks_in_wrong_order, (), {"drafts"}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_planted_bug_is_found(check, monkeypatch, bug, options, found_by):
    bug(monkeypatch)

    code, record = check(*options)

    found = {divergence["against"] for divergence in record["divergences"] if divergence["verdict"] == "violation"}
    found |= {"distribution" for test in record["distributions"] if test["p_value"] < 1e-4}
    assert code == 1, record["distributions"]
    assert record["lossless"] is False
    assert found >= found_by


@pytest.mark.parametrize("options", [(), MIXED, SAMPLED], ids=["greedy", "mixed", "sampled"])
def test_without_a_bug_nothing_is_found(check, options):
    code, record = check(*options)

    assert code == 0
    assert record["divergences"] == []
