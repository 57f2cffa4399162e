"""The environment of a run, for its JSON."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import space_cli
from space_cli.compile.fingerprint import weights_digest
from space_cli.compile.toolchain import processor_field
from space_cli.core.costs import ASSUMED_COSTS
from space_cli.models.loading import LoadedModel


def environment(loaded: LoadedModel) -> dict[str, Any]:
    """Return versions, machine, weights, dtype, quantization, engine, step costs and date."""
    return {
        "space": space_cli.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "platform": platform.platform(),
        "processor": processor_field("model name"),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(loaded.model.device) if loaded.model.device.type == "cuda" else None,
        "device": loaded.device,
        "dtype": loaded.dtype,
        "quantization": loaded.quantization,
        "weights": weights_digest(loaded.model),
        "engine": "eager" if loaded.compiled is None else "compiled",
        "step_costs": None if loaded.costs is ASSUMED_COSTS else asdict(loaded.costs),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _commit() -> str | None:
    """Return the commit when run from a checkout of this project, else None."""
    root = Path(space_cli.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        git = subprocess.run(command, capture_output=True, text=True, check=False)  # fixed arguments, no shell
    except OSError:  # a checkout on a machine without git
        return None
    return git.stdout.strip() or None
