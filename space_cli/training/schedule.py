"""A learning rate scheduled by hours instead of steps: warm-up, constant, and decay to zero at the end.

How many steps an hour holds need not be known, and the level part can be gone on with: a training that is taken up with
more hours rises to its level again and comes down later.
"""

from __future__ import annotations

import time
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import IntervalStrategy, TrainerCallback
from transformers.trainer_utils import SaveStrategy

_WARMUP_STEPS = 30
_DECAY_SHARE = 0.25
SPENT = "hours"
"""Its name in the log, from where a resumed training knows what was spent before."""


class HoursSchedule(TrainerCallback):
    """Ends a training after a number of hours, including those before a resume.

    Args:
        hours: in all.
        began: when this sitting's began, by `time.monotonic`, answers included; None is when it begins to train.

    Attributes:
        spent: hours of earlier sittings.
    """

    def __init__(self, hours: float, began: float | None = None) -> None:
        self._hours = hours
        self.spent = 0.0
        self._given = began
        self._began = time.monotonic() if began is None else began
        self._first_step = 0

    @property
    def so_far(self) -> float:
        """Return the hours spent so far."""
        return self.spent + (time.monotonic() - self._began) / 3600

    def scheduler(self, optimizer: Optimizer) -> LambdaLR:
        """Return the scheduler for a training that starts now."""
        return LambdaLR(optimizer, self._factor)

    def _factor(self, step: int) -> float:
        left = 1 - self.so_far / self._hours
        return max(0.0, min(1.0, (step - self._first_step + 1) / _WARMUP_STEPS, left / _DECAY_SHARE))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the hours spent before."""
        self.spent = max((row[SPENT] for row in state.log_history if SPENT in row), default=0.0)
        self._began = time.monotonic() if self._given is None else self._given
        self._first_step = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop when the time is up, after evaluating and saving."""
        if self.so_far >= self._hours:
            control.should_training_stop = True
            control.should_evaluate = args.eval_strategy != IntervalStrategy.NO
            control.should_save = args.save_strategy != SaveStrategy.NO
