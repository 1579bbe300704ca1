"""A script's PEP 723 header: requires-python, dependencies, and the submit options of [tool.grid].

Option names are the submit command's, with "-" or "_", singular or plural where both are natural.
"""

from __future__ import annotations

import os
import platform
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from packaging.specifiers import InvalidSpecifier, SpecifierSet

from grid.api.client import ControlError
from grid.config import parse_duration, parse_size
from grid.pack_errors import PackError

BLOCK = re.compile(r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$")
"""The reference expression of PEP 723."""
ALIASES = {"file": "files", "tag": "tags"}


@dataclass
class Header:
    """What a script says about itself."""

    requires_python: str = ""
    dependencies: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)


def read(path: Path, text: str) -> Header:
    """Read the header of the script's text. Raises PackError."""
    blocks = [match for match in BLOCK.finditer(text.replace("\r\n", "\n")) if match["type"] == "script"]
    if not blocks:
        return Header()
    if len(blocks) > 1:
        raise PackError(f"{path} has {len(blocks)} headers ('# /// script')", "keep one")
    lines = blocks[0]["content"].splitlines(keepends=True)
    try:
        table = tomllib.loads("".join(line[2:] if line.startswith("# ") else line[1:] for line in lines))
    except tomllib.TOMLDecodeError as error:
        raise PackError(f"the header of {path} is not TOML: {error}") from None
    requires = table.get("requires-python", "")
    dependencies = table.get("dependencies", [])
    if not isinstance(requires, str) or not _is_strings(dependencies):
        raise PackError(f"in the header of {path}, requires-python is a string and dependencies a list of strings")
    tool = table.get("tool", {})
    options = tool.get("grid", {}) if isinstance(tool, dict) else {}
    if not isinstance(options, dict):
        raise PackError(f"in the header of {path}, [tool.grid] must be a table")
    return Header(requires, dependencies, dict(_option(path, name, value) for name, value in options.items()))


def check_python(path: Path, requires: str) -> None:
    """Raise PackError if this Python is not one that the script is for."""
    if not requires:
        return
    try:
        fits = SpecifierSet(requires).contains(platform.python_version(), prereleases=True)
    except InvalidSpecifier:
        raise PackError(f"in the header of {path}, requires-python {requires!r} is no version specifier") from None
    if not fits:
        raise PackError(
            f"{path} requires Python {requires}, this grid runs {platform.python_version()}",
            "submit it from a machine whose peer runs a Python that fits",
        )


def _is_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _option(path: Path, name: str, value: Any) -> tuple[str, Any]:
    """Check one option and bring it to the form that the command line's has."""
    key = name.replace("_", "-")
    key = ALIASES.get(key, key)
    check = CHECKS.get(key)
    if check is None:
        known = ", ".join(sorted(CHECKS))
        raise PackError(f"in the header of {path}, [tool.grid] has no option {name!r}", f"it knows {known}")
    try:
        return key, check(value)
    except ControlError as error:
        raise PackError(f"in the header of {path}, {name}: {error.message}", error.hint) from None
    except (ValueError, TypeError) as error:
        raise PackError(f"in the header of {path}, {name} must be {error}") from None


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if not _is_strings(value):
        raise ValueError("a string or a list of strings")
    return list(value)


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a string")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _number(least: int, most: int | None = None) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < least or (most is not None and value > most):
            raise ValueError(f"a whole number from {least}" + ("" if most is None else f" to {most}"))
        return value

    return check


def _duration(value: Any) -> float:
    if isinstance(value, str):
        return parse_duration(value)
    if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
        return float(value)
    raise ValueError("seconds, or text such as '15m'")


def _size(value: Any) -> int:
    if isinstance(value, str):
        return parse_size(value)
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    raise ValueError("bytes, or text such as '2G'")


def _environment(value: Any) -> dict[str, str]:
    if isinstance(value, dict):
        if not all(isinstance(item, str) for item in value.values()):
            raise ValueError("a table of strings, or a list of 'NAME' or 'NAME=VALUE'")
        return dict(value)
    found: dict[str, str] = {}
    for word in _strings(value):
        name, equals, text = word.partition("=")
        if not equals and name not in os.environ:
            raise ValueError(f"set: {name} is not in this environment; write '{name}=VALUE'")
        found[name] = text if equals else os.environ[name]
    return found


CHECKS: dict[str, Callable[[Any], Any]] = {
    "files": _strings,
    "with": _strings,
    "env": _environment,
    "stdin": _string,
    "network": _flag,
    "name": _string,
    "replicas": _number(1, 99),
    "strict": _flag,
    "verify": _string,
    "timeout": _duration,
    "task-timeout": _duration,
    "retries": _number(0, 1000),
    "seed": _number(0, (1 << 63) - 1),
    "cpus": _number(1, 4096),
    "memory": _size,
    "tags": _strings,
    "output": _string,
}
"""The options that a header may hold, and what makes a value of one."""
