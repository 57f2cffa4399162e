"""What a chat says of its speed, and what it measures for its drafts."""

from types import SimpleNamespace

import pytest

from space_cli.cli import session as module
from space_cli.cli.session import ChatSettings, Session
from space_cli.core.costs import ASSUMED_COSTS, StepCosts
from space_cli.core.stream import Generation, Step
from space_cli.models.prompting import Known

STEADY = [0.1, 0.1, 0.1, 0.1]


def step(tokens, seconds):
    return Step(tuple(range(tokens)), tokens - 1, (), (), 1, seconds)


@pytest.fixture
def told(monkeypatch):
    """Return the speedup told of an answer with so many tokens a step, beside AR steps that took so long."""

    def tell(own, ar, *, tokens=2):
        loaded = SimpleNamespace(
            model=None, mask_token_ids=(1,), program=None, context_length=None, prompt_template=None
        )
        monkeypatch.setattr(module, "Chat", lambda *_, **__: None)
        monkeypatch.setattr(module, "decode", lambda *_, **__: iter([step(1, seconds) for seconds in ar]))
        chat = Session(loaded, ChatSettings(), template=None)
        chat.last = (Known("", [1, 2]), Generation([step(tokens, seconds) for seconds in own]))
        return chat.speedup()

    return tell


def test_the_speedup_is_against_ar_steps_timed_right_behind_the_answer(told):
    assert told(STEADY, STEADY) == pytest.approx(2)
    assert told([0.2] * 4, STEADY) == pytest.approx(1)


@pytest.mark.parametrize(
    ("own", "ar"),
    [
        (STEADY, [0.1, 0.1, 0.5, 0.5]),
        ([0.1, 0.1, 0.1, 0.9, 0.9], STEADY),
        ([0.9] * 4, STEADY),
        (STEADY, [0.4] * 4),
    ],
    ids=["AR scatters", "the answer scatters", "the answer met other work", "AR met other work"],
)
def test_nothing_is_told_where_other_work_makes_speeds_incomparable(told, own, ar):
    assert told(own, ar) is None


def test_step_costs_are_measured_when_an_answer_first_drafts_by_them(monkeypatch):
    found, asked = StepCosts({1: 1.0}), []
    loaded = SimpleNamespace(mask_token_ids=(1,), masks_per_group=3, prompt_template=None, costs=ASSUMED_COSTS)
    loaded.drafts = lambda candidates: asked.append(candidates)
    measured = SimpleNamespace(**vars(loaded) | {"costs": found})
    monkeypatch.setattr(module, "Chat", lambda *_, **__: None)
    monkeypatch.setattr(module, "measured", lambda _: measured)
    chat = Session(loaded, ChatSettings(mode="ar", candidates=2), template=None)

    chat.drafts("ar")
    chat.drafts("space")
    assert chat.loaded is loaded
    chat.change("candidates", "auto")
    chat.drafts("space")

    assert chat.loaded.costs is found
    assert asked == [2, None]
