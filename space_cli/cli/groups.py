"""Options in groups: a command takes a pydantic model, and Typer sees one option for each of its fields.

Typer has no groups of its own. `grouped` rewrites a command's signature once, when the command is registered; a field's
limits become those that `--help` shows, and the model checks them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from copy import copy
from typing import Annotated, Any, ClassVar, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from typer.models import OptionInfo

from space_cli.errors import UsageProblem, first_invalid


class Group(BaseModel):
    """Options that belong together; each field is `Annotated` with a `typer.Option`."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, allow_inf_nan=False)


def grouped(command: Callable[..., Any]) -> Callable[..., Any]:
    """Return a command whose groups are spread into options, in the order of the groups and their fields."""
    groups: dict[str, type[Group]] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        if isinstance(parameter.annotation, type) and issubclass(parameter.annotation, Group):
            groups[parameter.name] = parameter.annotation
            parameters += _options(parameter.annotation)
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def run(**given: Any) -> Any:
        for name, group in groups.items():
            fields = {field: given.pop(field) for field in group.model_fields}
            given[name] = _checked(group, fields)
        return command(**given)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def _options(group: type[Group]) -> list[inspect.Parameter]:
    """Return the parameters that stand for a group's fields."""
    types = get_type_hints(group, include_extras=True)
    parameters = []
    for name, field in group.model_fields.items():
        annotation, *extras = get_args(types[name]) if get_origin(types[name]) is Annotated else (types[name],)
        option = copy(next(each for each in extras if isinstance(each, OptionInfo)))
        _show_limits(option, field)
        default = inspect.Parameter.empty if field.is_required() else field.default
        parameters.append(
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[annotation, option]
            )
        )
    return parameters


def _show_limits(option: OptionInfo, field: FieldInfo) -> None:
    """Give an option the limits of its field that Typer can show; exclusive ones are left to the model."""
    for limit in field.metadata:
        if isinstance(limit, Ge):
            option.min = limit.ge  # type: ignore[assignment]
        elif isinstance(limit, Le):
            option.max = limit.le  # type: ignore[assignment]
        elif isinstance(limit, Lt) and isinstance(limit.lt, int):
            option.max = limit.lt - 1
        elif isinstance(limit, Gt) and isinstance(limit.gt, int) and field.annotation is int:
            option.min = limit.gt + 1


def _checked(group: type[Group], given: Mapping[str, Any]) -> Group:
    """Return the group of what was given.

    Raises:
        UsageProblem: a value is out of range; names its option.
    """
    try:
        return group(**given)
    except ValidationError as error:
        found = first_invalid(error)
        field = group.model_fields[found.field.partition(".")[0]]
        # an option inside `Annotated` holds its first name where one in a default holds the default
        option = next(each.default for each in field.metadata if isinstance(each, OptionInfo))
        raise UsageProblem(f"{option} {found.value}: {found.reason}") from error
