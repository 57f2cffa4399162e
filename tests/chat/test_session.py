"""What a chat says of its speed."""

from types import SimpleNamespace

import pytest

from space_cli.chat import session as module
from space_cli.chat.session import ChatSettings, Session
from space_cli.chat.templates import Prefix
from space_cli.core.stream import Generation, Step

STEADY = [0.1, 0.1, 0.1, 0.1]


def step(tokens, seconds):
    return Step(tuple(range(tokens)), tokens - 1, (), (), 1, seconds)


@pytest.fixture
def speedup(monkeypatch):
    """Return the speedup reported for an answer with so many tokens a step, beside AR steps that took so long."""

    def tell(own, ar, *, tokens=2):
        loaded = SimpleNamespace(
            name="m", model=None, masks_per_group=1, compiled=None, context_length=None, prompt_template=None
        )
        monkeypatch.setattr(module, "Chat", lambda *_, **__: None)
        chat = Session(loaded, ChatSettings(), template=None)
        monkeypatch.setattr(chat.model, "steps", lambda *_, **__: iter([step(1, seconds) for seconds in ar]))
        chat.last = (Prefix("", [1, 2]), Generation([step(tokens, seconds) for seconds in own]))
        return chat.speedup()

    return tell


def test_the_speedup_is_against_ar_steps_timed_right_behind_the_answer(speedup):
    assert speedup(STEADY, STEADY) == pytest.approx(2)
    assert speedup([0.2] * 4, STEADY) == pytest.approx(1)


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
def test_nothing_is_said_where_other_work_makes_speeds_incomparable(speedup, own, ar):
    assert speedup(own, ar) is None
