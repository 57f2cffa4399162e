"""Put a trained stage into the package: weights in their shipped dtype, tokenizer, space_config.json.

python -m space_cli.nano.publish --init final
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from space_cli.models.checkpoint import SpaceConfig

WEIGHTS = Path(__file__).with_name("weights")


def main() -> None:
    """Copy the stage."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path("build/nano"), help="folder the other paths are relative to")
    parser.add_argument("--init", required=True, help="folder of the stage")
    parser.add_argument("--candidates", type=int, required=True, help="k to decode with by default")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    args = parser.parse_args()
    stage = args.root / args.init
    model = AutoModelForCausalLM.from_pretrained(stage, dtype=getattr(torch, args.dtype))
    model.save_pretrained(WEIGHTS)
    AutoTokenizer.from_pretrained(stage).save_pretrained(WEIGHTS)
    SpaceConfig.load(stage).model_copy(update={"candidates": args.candidates}).save(WEIGHTS)


if __name__ == "__main__":
    main()
