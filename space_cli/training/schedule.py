"""A learning rate scheduled by hours instead of steps: warm-up, constant, and decay to zero at the end.

How many steps an hour holds need not be known, and the level part can be gone on with: a training that is taken up with
more hours rises to its level again and comes down later.
"""

from __future__ import annotations

import time
from typing import Any

from accelerate.utils import broadcast_object_list
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import IntervalStrategy, TrainerCallback
from transformers.trainer_utils import SaveStrategy

_WARMUP_STEPS = 30
_DECAY_SHARE = 0.25
_SECONDS_PER_SAVE = 600
SPENT = "hours"
"""Its name in the log, from where a resumed training knows what was spent before."""


class HoursSchedule(TrainerCallback):
    """Ends a training after a number of hours, including those before a resume, and saves it every ten minutes.

    Of several processes the first one's clock counts for all.

    Args:
        hours: in all.
        began: when this sitting's began, by `time.monotonic`, answers included; None is when it begins to train.

    Attributes:
        so_far: hours spent when the last step ended.
    """

    def __init__(self, hours: float, began: float | None = None) -> None:
        self._hours = hours
        self._spent = 0.0
        self._given = began
        self._began = self._saved = time.monotonic() if began is None else began
        self._first_step = 0
        self.so_far = 0.0

    def scheduler(self, optimizer: Optimizer) -> LambdaLR:
        """Return the scheduler for a training that starts now."""
        return LambdaLR(optimizer, self._factor)

    def _factor(self, step: int) -> float:
        left = 1 - self.so_far / self._hours
        return max(0.0, min(1.0, (step - self._first_step + 1) / _WARMUP_STEPS, left / _DECAY_SHARE))

    def _look(self) -> bool:
        """Look at the clock; return whether to save."""
        now = time.monotonic()
        spent = self._spent + (now - self._began) / 3600
        self.so_far, is_due = broadcast_object_list([spent, now - self._saved >= _SECONDS_PER_SAVE])
        return bool(is_due)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the hours spent before."""
        self._spent = max((row[SPENT] for row in state.log_history if SPENT in row), default=0.0)
        self._saved = time.monotonic()
        self._began = self._saved if self._given is None else self._given
        self._first_step = state.global_step
        self._look()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate and save when it is time; stop when the time is up."""
        is_due = self._look()
        if self.so_far >= self._hours:
            control.should_training_stop = is_due = True
        if is_due:
            control.should_evaluate |= args.eval_strategy != IntervalStrategy.NO
            control.should_save |= args.save_strategy != SaveStrategy.NO

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note when that was."""
        self._saved = time.monotonic()
