"""Put what `space train` made into the package: weights in their shipped dtype, tokenizer, space_config.json.

python -m space_cli.nano.publish --candidates 2
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from space_cli.models.checkpoint import SpaceConfig
from space_cli.nano import recipe_parser

WEIGHTS = Path(__file__).with_name("weights")


def main() -> None:
    """Copy the checkpoint."""
    parser = recipe_parser(__doc__)
    parser.add_argument("--candidates", type=int, required=True, help="k to decode with by default")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    args = parser.parse_args()
    trained = args.root / "space"
    model = AutoModelForCausalLM.from_pretrained(trained, dtype=getattr(torch, args.dtype))
    model.save_pretrained(WEIGHTS)
    AutoTokenizer.from_pretrained(trained).save_pretrained(WEIGHTS)
    config = SpaceConfig.load(trained)
    # the folder it was made in means nothing elsewhere
    training = config.training | {"base": Path(config.training["base"]).name}
    config.model_copy(update={"candidates": args.candidates, "training": training}).save(WEIGHTS)


if __name__ == "__main__":
    main()
