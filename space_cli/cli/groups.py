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

import typer
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from typer.models import OptionInfo

from space_cli.errors import UsageProblem, first_invalid


class Group(BaseModel):
    """Options that belong together.

    A field `batch_size` with a description is an option `--batch-size` with that help; a field that needs more of Typer
    is `Annotated` with a `typer.Option` of its own.
    """

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
        annotation = get_args(types[name])[0] if get_origin(types[name]) is Annotated else types[name]
        option = copy(_option_of(field)) or typer.Option(_option_name(name, field), help=field.description)
        _show_limits(option, field)
        default = inspect.Parameter.empty if field.is_required() else field.default
        parameters.append(
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[annotation, option]
            )
        )
    return parameters


def _option_of(field: FieldInfo) -> OptionInfo | None:
    return next((each for each in field.metadata if isinstance(each, OptionInfo)), None)


def _option_name(name: str, field: FieldInfo) -> str:
    option = _option_of(field)
    # an option inside `Annotated` holds its first name where one in a default holds the default
    return f"--{name.replace('_', '-')}" if option is None else str(option.default)


def _show_limits(option: OptionInfo, field: FieldInfo) -> None:
    """Give an option the limits of its field that Typer can show; an exclusive one of a float is left to the model."""
    for limit in field.metadata:
        option.min = getattr(limit, "ge", option.min)
        option.max = getattr(limit, "le", option.max)
        if field.annotation is int and hasattr(limit, "lt"):
            option.max = limit.lt - 1


def _checked(group: type[Group], given: Mapping[str, Any]) -> Group:
    """Return the group of what was given.

    Raises:
        UsageProblem: a value is out of range; names its option.
    """
    try:
        return group(**given)
    except ValidationError as error:
        found = first_invalid(error)
        name = found.field.partition(".")[0]
        option = _option_name(name, group.model_fields[name])
        raise UsageProblem(f"{option} {found.value}: {found.reason.removeprefix('Value error, ')}") from error
