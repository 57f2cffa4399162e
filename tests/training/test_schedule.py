from types import SimpleNamespace

import pytest
from transformers import TrainerControl

from space_cli.training import schedule

ARGS = SimpleNamespace(eval_strategy="steps", save_strategy="steps")


@pytest.fixture
def clock(monkeypatch):
    """A clock whose seconds a test sets."""
    made = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(schedule.time, "monotonic", lambda: made.seconds)
    return made


def begun(hours, history=()):
    made = schedule.HoursSchedule(hours)
    made.on_train_begin(ARGS, SimpleNamespace(log_history=list(history), global_step=0), TrainerControl())
    return made


def step_after(made, clock, minutes):
    control = TrainerControl()
    clock.seconds += 60 * minutes
    made.on_step_end(ARGS, SimpleNamespace(), control)
    if control.should_save:
        made.on_save(ARGS, SimpleNamespace(), control)
    return control


def test_a_checkpoint_is_measured_and_saved_every_ten_minutes(clock):
    made = begun(2)

    saved = [step_after(made, clock, 4) for _ in range(9)]

    assert [control.should_save for control in saved] == [False, False, True] * 3
    assert [control.should_evaluate for control in saved] == [control.should_save for control in saved]
    assert not any(control.should_training_stop for control in saved)


def test_hours_before_a_resume_count(clock):
    made = begun(1, [{"hours": 0.5}, {"loss": 1.0}])

    assert not step_after(made, clock, 29).should_training_stop
    control = step_after(made, clock, 1)

    assert control.should_training_stop
    assert control.should_save
    assert control.should_evaluate
    assert made.so_far == pytest.approx(1)
