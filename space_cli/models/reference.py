"""The reference of a quantised model: the same weights in float32, run by transformers."""

from __future__ import annotations

import copy
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

from space_cli.core.quantized import dequantize, has_quantized_layers

_made: WeakKeyDictionary[PreTrainedModel, PreTrainedModel] = WeakKeyDictionary()


def reference_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model with dequantised weights (cached); other models are returned unchanged."""
    if not has_quantized_layers(model):
        return model
    if model not in _made:
        dense = copy.deepcopy(model)
        dequantize(dense)
        _made[model] = dense
    return _made[model]
