"""Checks names before any work that transformers' Trainer would refuse only after preparation."""

from __future__ import annotations

import difflib
import tempfile

from transformers import Trainer, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.training_args import OptimizerNames

from space_cli.errors import UsageProblem


def check_names(*, optim: str, report_to: str) -> None:
    """Refuse an optimizer or a reporting service that cannot be used here.

    Raises:
        UsageProblem: which one, and what there is.
    """
    _check_optimizer(optim)
    _check_reporting(report_to)


def _check_optimizer(name: str) -> None:
    """Refuse an optimizer that transformers does not know, or whose package is missing."""
    names = [each.value for each in OptimizerNames]
    if name not in names:
        close = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or ["adamw_torch", "adafactor", "sgd"]
        raise UsageProblem(f"--optim {name}: no optimizer of that name", hint=f"as {', '.join(close)}")
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(output_dir=folder, optim=name, use_cpu=True, report_to="none")
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments)
    except (ImportError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageProblem(f"--optim {name}: cannot be used here: {reason}", hint="use adamw_torch") from error


def _check_reporting(name: str) -> None:
    """Refuse a reporting service that Trainer does not know, or whose package is missing."""
    if name in ("none", "all"):
        return
    if name not in INTEGRATION_TO_CALLBACK:
        known = ", ".join(["none", "all", *sorted(INTEGRATION_TO_CALLBACK)])
        raise UsageProblem(f"--report-to {name}: nothing of that name to report to", hint=f"use {known}")
    if name not in get_available_reporting_integrations():
        raise UsageProblem(f"--report-to {name}: its package is not installed", hint=f"pip install {name}, or use none")
