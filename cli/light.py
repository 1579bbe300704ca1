"""Reading option values without pydantic.

typer converts every value, even an absent one, through pydantic, whose import and set-up cost more than all the rest of a
command's start. Plain strings, paths and numbers in range need none of that; anything else, errors included, goes typer's way.
"""

from __future__ import annotations

import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PLAIN: dict[Any, Callable[[str], Any]] = {str: str, Path: Path, int: int}


def lighten(command: Any, function: Callable[..., Any]) -> None:
    """Make the parameters of a click command, built from this function, read simple values themselves."""
    lighten_help(command)
    hints = typing.get_type_hints(function, include_extras=True)
    for parameter in command.params:
        if parameter.name in hints:
            parameter.process_value = _reader(parameter, hints[parameter.name], parameter.process_value)


def lighten_help(command: Any) -> None:
    """Make an absent --help cost nothing."""
    usual_option = command.get_help_option

    def get_help_option(context: Any) -> Any:
        option = usual_option(context)
        if option is not None:
            usual = type(option).process_value.__get__(option)
            option.process_value = lambda context, value: usual(context, value) if value else False
        return option

    command.get_help_option = get_help_option


def _reader(parameter: Any, hint: Any, usual: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    kind, info = typing.get_args(hint)
    plain = [_PLAIN[part] for part in (kind, *_parts(kind)) if part in _PLAIN]
    many = parameter.multiple or parameter.nargs == -1
    low, high = getattr(info, "min", None), getattr(info, "max", None)

    def read(context: Any, value: Any) -> Any:
        if parameter.callback is not None or not plain:
            return usual(context, value)
        if not value and (value is None or many):
            return usual(context, value) if parameter.required else () if many else None
        words = value if many else [value]
        if not all(_is_simple(word, plain[0] is int, low, high) for word in words):
            return usual(context, value)
        return [plain[0](word) for word in words] if many else plain[0](value)

    return read


def _parts(kind: Any) -> list[Any]:
    """Return what a union or list is made of: `list[str] | None` gives list[str], None and str."""
    parts = list(typing.get_args(kind))
    return parts + [inner for part in parts for inner in typing.get_args(part)]


def _is_simple(word: Any, number: bool, low: float | None, high: float | None) -> bool:
    if not isinstance(word, str):
        return isinstance(word, (int, Path)) and not isinstance(word, bool)  # a default
    if not number:
        return True
    return word.isascii() and word.isdecimal() and (low is None or int(word) >= low) and (high is None or int(word) <= high)
