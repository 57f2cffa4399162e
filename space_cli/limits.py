"""The limits of numbers that a user gives: the same for options, the settings of a chat, the Python interface and HTTP.

No limit lets infinity or NaN pass; a model that uses these types sets `allow_inf_nan=False`.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

Temperature = Annotated[float, Field(ge=0)]
TopK = Annotated[int, Field(ge=0)]
TopP = Annotated[float, Field(gt=0, le=1)]
MinP = Annotated[float, Field(ge=0, le=1)]
RepetitionPenalty = Annotated[float, Field(gt=0)]
CountPenalty = Annotated[float, Field(ge=-2, le=2)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
MaxNewTokens = Annotated[int, Field(ge=1)]
