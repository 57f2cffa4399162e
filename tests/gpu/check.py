"""Everything that a GPU can tell about this project, in one command of at most 8 minutes.

    python tests/gpu/check.py --output FOLDER

Run it from the repository root. It writes FOLDER/check.json and FOLDER/check.txt, anew after every section: what a
time limit or a fault cuts off costs no more than the section it is in. `--dry-run` does all of it on a CPU with models
of a few thousand weights, graphs off and float32.

The figures of a step are wall times of all a decoder waits for, launch and copy included; "the graph alone" is not.

Needs: torch >= 2.11 with CUDA (Triton comes with it), transformers >= 5.17, accelerate, peft, numpy, psutil,
platformdirs, pydantic; for int8 and nf4 bitsandbytes; for GGUF files gguf. Of these a machine with PyTorch's usual
company lacks pydantic (with pydantic-core, annotated-types, typing-inspection) and bitsandbytes: bring them as wheels.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass
class Run:
    """What is found, and how much time is left.

    Attributes:
        rows: of the table: section, what, and numbers by name.
        told: by section, what is no row.
        failed: by section, why it ended early.
    """

    output: Path
    dry: bool
    seconds: float
    models: list[str]
    began: float = field(default_factory=time.monotonic)
    section: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)
    told: dict[str, Any] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    took: dict[str, float] = field(default_factory=dict)

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return self.seconds - (time.monotonic() - self.began)

    def row(self, what: str, **numbers: Any) -> None:
        """Note a row of the table and print it."""
        self.rows.append({"section": self.section, "what": what, **numbers})
        print(_line(self.rows[-1]), flush=True)

    def note(self, name: str, value: Any) -> None:
        """Note what is no row."""
        self.told.setdefault(self.section, {})[name] = value

    def fault(self, what: str) -> None:
        """Note an error that is being handled; the section goes on."""
        text = traceback.format_exc()
        self.failed[f"{self.section}: {what}"] = text[-4000:]
        print(f"{self.section}: {what}: {text.strip().splitlines()[-1]}", file=sys.stderr, flush=True)

    def write(self, *, complete: bool) -> None:
        """Write what is known so far."""
        self.output.mkdir(parents=True, exist_ok=True)
        record = {
            "complete": complete,
            "dry_run": self.dry,
            "command": " ".join(sys.argv),
            "date": time.strftime("%Y-%m-%d"),
            "seconds": round(time.monotonic() - self.began, 1),
            "seconds_by_section": self.took,
            "environment": _environment(self.dry),
            "rows": self.rows,
            "notes": self.told,
            "failed": self.failed,
        }
        table = "\n".join(_line(row) for row in self.rows) + "\n"
        for name, text in (("check.json", json.dumps(record, indent=1, default=str)), ("check.txt", table)):
            part = self.output / f".{name}.part"
            part.write_text(text)
            part.replace(self.output / name)


def _line(row: dict[str, Any]) -> str:
    numbers = {name: value for name, value in row.items() if name not in ("section", "what")}
    told = "  ".join(
        f"{name} {f'{value:.4g}' if isinstance(value, float) else value}" for name, value in numbers.items()
    )
    return f"{row['section']:<10} {row['what']:<44} {told}"


def _environment(dry: bool) -> dict[str, Any]:
    import torch
    import transformers

    told = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    if dry:
        return told | {"device": platform.machine()}
    properties = torch.cuda.get_device_properties(0)
    return told | {
        "device": properties.name,
        "cuda": torch.version.cuda,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
    }


def _out_of_time(*_: object) -> None:
    raise TimeoutError("out of time")


def main() -> int:
    """Run the sections in order, as long as there is time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", "gpu-check")))
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, with tiny models")
    parser.add_argument("--seconds", type=float, default=460.0, help="when it ends, done or not")
    parser.add_argument("--model", action="append", help="trained models beside nano: a folder or GGUF file")
    parser.add_argument("--only", help="sections, with commas between them")
    arguments = parser.parse_args()
    run = Run(arguments.output, arguments.dry_run, arguments.seconds, ["nano", *(arguments.model or [])])

    import sections

    # what is under way at the end is broken off, and so is whatever would begin after it
    signal.signal(signal.SIGALRM, _out_of_time)
    signal.setitimer(signal.ITIMER_REAL, 10 * run.seconds if run.dry else run.seconds, 5.0)
    chosen = arguments.only.split(",") if arguments.only else list(sections.SECTIONS)
    for name in chosen:
        run.section, began = name, time.monotonic()
        if run.left < sections.MIN_SECONDS[name] and not run.dry:
            run.failed[name] = f"not begun: {run.left:.0f} s left"
            continue
        try:
            sections.SECTIONS[name](run)
        except Exception:  # noqa: BLE001  # one fault must not cost the other figures
            run.fault("ended early")
        run.took[name] = round(time.monotonic() - began, 1)
        sections.release()
        run.write(complete=False)
    signal.setitimer(signal.ITIMER_REAL, 0.0)
    run.write(complete=True)
    print(f"{run.output / 'check.json'}: {len(run.rows)} rows, {len(run.failed)} faults", flush=True)
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main())
