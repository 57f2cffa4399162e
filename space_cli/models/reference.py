"""What a quantised model is held against: the same weights in float32, run by transformers alone."""

from __future__ import annotations

import copy
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

from space_cli.core.quantized import dequantize, has_quantized_layers

_made: WeakKeyDictionary[PreTrainedModel, PreTrainedModel] = WeakKeyDictionary()


def reference_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model with its weights dequantised, made the first time it is asked for; others as they are."""
    if not has_quantized_layers(model):
        return model
    if model not in _made:
        dense = copy.deepcopy(model)
        dequantize(dense)
        _made[model] = dense
    return _made[model]
