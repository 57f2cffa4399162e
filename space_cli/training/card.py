"""The model card of a training, and its curves."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from space_cli.models.checkpoint import SpaceConfig

_TEMPLATE = """---
library_name: space
base_model: {base}
---

# {name}

A SPACE checkpoint: mask tokens behind the input guess the next {k} tokens, and decoding verifies them
([arXiv 2402.11809](https://arxiv.org/abs/2402.11809)). {method}

```bash
space bench --model {name}
space verify-lossless --model {name}
```

{acceptance}

On prompts held out of the training; plain: without answers that repeat themselves. Trained with `space train` on
{examples} examples, {distilled} of them answers of its own; every setting stands in `space_config.json`, every logged
step in `training.jsonl`.
"""
_METHODS = {
    "full": "All weights were tuned: its output is its own, and differs from that of `{base}`.",
    "adapter": "An adapter: the weights of `{base}` are untouched, and so is its output.",
}


def card(space: SpaceConfig, name: str) -> str:
    """Return the model card of a checkpoint."""
    settings = space.training
    lines = [
        f"| {when} | {each['candidates']} | {each['tokens_per_step']:.2f} | {_figure(each['tokens_per_step_plain'])} |"
        f" {each['repetitive']} of {each['prompts']} | {_figure(each['answer_loss'])} |"
        for when, each in space.acceptance.items()
    ]
    heading = (
        "| training | k | tokens per step | plain | repetitive answers | AR loss of the data's answers |",
        "| --- | --- | --- | --- | --- | --- |",
    )
    return _TEMPLATE.format(
        base=settings["base"],
        name=name,
        k=space.candidates,
        method=_METHODS[space.method].format(base=settings["base"]),
        acceptance="\n".join([*heading, *lines]) if lines else "Acceptance was not measured: no prompts were held out.",
        examples=settings["examples"] + settings["distilled"],
        distilled=settings["distilled"],
    )


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def draw_curves(history: Sequence[dict[str, Any]], file: Path) -> bool:
    """Draw losses and accuracies over the steps; return False without matplotlib.

    Args:
        history: Trainer's log.
        file: a PNG.
    """
    if find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    for name in ("ar_loss", "mask_loss"):
        _line(losses, history, name)
        _line(losses, history, f"eval_{name}", label=f"held-out {name}", linestyle="--")
    for name in sorted({name for row in history for name in row if name.startswith("mask_accuracy_")}):
        _line(accuracies, history, name)
    losses.set(xlabel="step", ylabel="loss per token")
    accuracies.set(xlabel="step", ylabel="top-1 accuracy", ylim=(0, 1))
    for axes in (losses, accuracies):
        if axes.has_data():
            axes.legend()
    part = file.with_name(f".{file.name}")
    figure.savefig(part, format="png", dpi=120)
    part.replace(file)
    return True


def _line(axes: Any, history: Sequence[dict[str, Any]], name: str, label: str = "", linestyle: str = "-") -> None:
    points = [(row["step"], row[name]) for row in history if name in row]
    if points:
        axes.plot(*zip(*points, strict=True), label=(label or name).replace("_", " "), linestyle=linestyle)
