"""Analyses a divergence: could rounding explain both choices, or is one of them wrong?

Nothing here goes through our block, cache or engine: a mistake in them must not vouch for itself.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import psutil
import torch
from transformers import DynamicCache, PreTrainedModel

from space_cli.core.cache import cache_arguments
from space_cli.core.quantized import dequantize, num_parameters
from space_cli.core.sampling import Sampler
from space_cli.verify.record import Verdict

_ROWS_MEASURED = 32
_ROUNDINGS_TRIED = 200


@dataclass(frozen=True, slots=True)
class Finding:
    """The finding at a place where two choices differ.

    Attributes:
        gap: difference of the two scores in `exact_dtype`; None where one of the tokens could not be chosen.
        noise: largest error of a logit in the run's dtype, measured at this place.
    """

    gap: float | None
    noise: float
    exact_dtype: str
    verdict: Verdict


class DivergenceAnalyzer:
    """Examines divergences of one model; copies it to a wider dtype on first use.

    Args:
        model: as it was run.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    @torch.inference_mode()
    def examine(
        self, input_ids: Sequence[int], history: Sequence[int], sampler: Sampler, *, expected: int, got: int
    ) -> Finding:
        """Return whether rounding explains that one side chose `expected` and the other `got`.

        Args:
            input_ids: the call whose last row was chosen from: plain causal text, with masks behind it for a draft.
            history: the tokens before the choice, as logits processors and noise see them.
            sampler: of the run.
            expected: token id.
            got: token id.
        """
        exact, noise, exact_dtype = self._measure(input_ids)
        scores = sampler.step_logits(exact[None]).scores(0, history)
        gap = (scores[expected] - scores[got]).abs().item()
        explained = all(_rounding_explains(token, exact, noise, sampler, history) for token in (expected, got))
        return Finding(
            gap=gap if gap < float("inf") else None,
            noise=noise,
            exact_dtype=exact_dtype,
            verdict="tie" if explained else "violation",
        )

    def _measure(self, input_ids: Sequence[int]) -> tuple[torch.Tensor, float, str]:
        """Return the last row's (V,) logits in the wider dtype, the run's largest error, and the wider dtype."""
        ids = torch.tensor([list(input_ids)], device=self._model.device)
        whole = self._model(input_ids=ids, use_cache=False).logits[0, -_ROWS_MEASURED:].double()
        alone = self._last_row_alone(ids).double()
        if self._wider is None:
            # without a wider dtype, the difference of the two shapes is taken as the error of each
            return whole[-1], 2 * (alone - whole[-1]).abs().max().item(), str(self._model.dtype).removeprefix("torch.")
        exact = self._wider(input_ids=ids, use_cache=False).logits[0, -_ROWS_MEASURED:].double()
        noise = max((whole - exact).abs().max().item(), (alone - exact[-1]).abs().max().item())
        return exact[-1], noise, str(self._wider.dtype).removeprefix("torch.")

    def _last_row_alone(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the (V,) logits of the last token evaluated by a call of one row, as AR does."""
        cache = DynamicCache(config=self._model.config)
        if ids.shape[1] > 1:
            self._model.base_model(input_ids=ids[:, :-1], **cache_arguments(self._model.base_model, cache))
        logits: torch.Tensor = self._model(input_ids=ids[:, -1:], **cache_arguments(self._model, cache)).logits
        return logits[0, -1]

    @cached_property
    def _wider(self) -> PreTrainedModel | None:
        """The model in float64 on a CPU, float32 elsewhere; None if it is quantised or does not fit."""
        if getattr(self._model, "is_quantized", False):
            return None
        types = [torch.float64, torch.float32] if self._model.device.type == "cpu" else [torch.float32]
        for dtype in types:
            if dtype.itemsize <= self._model.dtype.itemsize or not self._fits(dtype):
                continue
            wider: PreTrainedModel = copy.deepcopy(self._model)
            dequantize(wider)
            wider.to(dtype)  # type: ignore[arg-type]  # wrapped in a way that hides its signature
            try:
                wider(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=wider.device))
            except (RuntimeError, TypeError):  # a layer that computes in a type of its own and takes no other
                continue
            return wider
        return None

    def _fits(self, dtype: torch.dtype) -> bool:
        needed = num_parameters(self._model) * dtype.itemsize
        if self._model.device.type == "cuda":
            return needed < torch.cuda.mem_get_info(self._model.device)[0] * 0.8
        available: int = psutil.virtual_memory().available
        return needed < available * 0.8


def _rounding_explains(token: int, exact: torch.Tensor, noise: float, sampler: Sampler, history: Sequence[int]) -> bool:
    """Return whether logits within `noise` of the exact ones have the sampler take `token`.

    First in the most favourable way, then at random: filters such as top-p depend on all logits at once.
    """
    favoured = exact.clone()
    favoured[token] += 2 * noise
    if sampler.step_logits(favoured[None]).token(0, history) == token:
        return True
    generator = torch.Generator().manual_seed(0)
    for _ in range(_ROUNDINGS_TRIED):
        error = (torch.rand(exact.shape, generator=generator, dtype=torch.float64) * 2 - 1) * noise
        if sampler.step_logits((exact + error.to(exact.device))[None]).token(0, history) == token:
            return True
    return False
