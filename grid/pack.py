"""From a script to a submission: everything a job takes along, staged as files for the peer to adopt.

Runs in the command's process. Rules this file keeps:

- whatever is wrong with the script, its options or its imports is said before anything is sent, in one line;
- the same script, options and inputs give the same archive and packs, byte for byte;
- inputs are streamed: memory does not grow with them.
"""

from __future__ import annotations

import ast
import dataclasses
import io
import os
import sys
import tarfile
import tokenize
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from grid import pack_header, pack_imports, pack_inputs, pack_lock
from grid.pack_errors import PackError

__all__ = ["PackError", "Submission", "pack"]

CODE_BYTES_MAX = 64 << 20
"""Local modules: more is data, which travels as inputs."""
LISTS_THAT_ADD_UP = ("files", "with")


@dataclasses.dataclass
class Submission:
    """A job before it is signed. Paths name files in the staging folder, which the peer adopts."""

    name: str
    script: str
    """Path in the archive."""
    argv: list[str]
    code: str
    """Path of the archive (tar)."""
    python: str
    """Minor version, such as "3.11"."""
    lock: str | None = None
    """pip's requirements format, pinned, with hashes. None: the job declares no packages."""
    manifest: str | None = None
    """Path of the list of inputs. None: there are none."""
    pack_paths: list[str] = dataclasses.field(default_factory=list)
    env: dict[str, str] = dataclasses.field(default_factory=dict)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Under the names of the submit options; durations in seconds, sizes in bytes."""
    notes: list[str] = dataclasses.field(default_factory=list)
    """Lines for the user: inputs that were left out, say."""


def pack(
    script: str | os.PathLike[str],
    args: Iterable[str],
    options: Mapping[str, Any],
    staging: Path,
    *,
    cache: Path | None = None,
) -> Submission:
    """Check the script, resolve what it needs, stage what it takes along. Raises PackError.

    `options`: the command line's; they beat the script's header, but "files" and "with" add up and "env" is merged.
    `cache`: where resolved dependencies are remembered (default: this user's cache folder).
    """
    path = Path(script)
    text, tree = _read(path)
    header = pack_header.read(path, text)
    merged = _merge(header.options, options)
    requirements = pack_lock.requirements(path, [*header.dependencies, *merged.pop("with", [])])
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    pack_header.check_python(path, header.requires_python)
    found = pack_imports.walk(path, tree)
    pack_imports.check_before(path, found, requirements)
    lock = pack_lock.resolve(requirements, python, cache) if requirements else None
    if lock is not None:
        pack_imports.check_after(path, found, requirements, lock)
    notes: list[str] = []
    inputs = [*((spec, Path.cwd()) for spec in options.get("files") or ())]
    inputs += [(spec, path.absolute().parent) for spec in header.options.get("files", ())]
    merged.pop("files", None)
    staged = pack_inputs.stage(inputs, path.absolute().parent, staging, notes) if inputs else None
    stdin = merged.get("stdin")
    if stdin and "stdin" not in options:
        merged["stdin"] = str(path.absolute().parent / stdin)
    return Submission(
        name=str(merged.pop("name", "") or path.name),
        script=path.resolve().name,
        argv=list(args),
        code=str(_archive(path, found.files, staging)),
        python=python,
        lock=lock,
        manifest=str(staged.manifest) if staged else None,
        pack_paths=[str(pack_path) for pack_path in staged.packs] if staged else [],
        env=merged.pop("env", {}),
        options=merged,
        notes=notes,
    )


def _read(path: Path) -> tuple[str, ast.Module]:
    """The script's text and syntax tree."""
    if not path.exists():
        raise PackError(f"no such script: {path}", "the script comes after the options: grid submit [OPTIONS] job.py [ARGS]")
    if not path.is_file():
        raise PackError(f"{path} is not a file", "name the script itself")
    return parse(path)


def parse(path: Path) -> tuple[str, ast.Module]:
    """Read and parse a Python file. Raises PackError: unreadable, or a syntax error with its place."""
    try:
        with tokenize.open(path) as file:
            text = file.read()
        return text, ast.parse(text, str(path))
    except SyntaxError as error:
        raise PackError(f"{path}:{error.lineno or 1}: syntax error: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError, null bytes
        raise PackError(f"{path} is not Python source: {error}") from None
    except OSError as error:
        raise PackError(f"{path} can't be read: {error.strerror}") from None


def _merge(header: dict[str, Any], line: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(header)
    for key, value in line.items():
        if value is None:
            continue
        if key in LISTS_THAT_ADD_UP:
            merged[key] = [*merged.get(key, ()), *value]
        elif key == "env":
            merged[key] = {**merged.get(key, {}), **value}
        else:
            merged[key] = value
    return merged


def _archive(script: Path, local: Iterable[Path], staging: Path) -> Path:
    """Write the script and its local modules into a tar that depends on nothing but their names and bytes."""
    folder = script.resolve().parent
    members = sorted({script.resolve(), *local})
    size = sum(member.stat().st_size for member in members)
    if size > CODE_BYTES_MAX:
        largest = max(members, key=lambda member: member.stat().st_size).relative_to(folder)
        raise PackError(
            f"the script and its local modules are {size / 1e6:.0f} MB, more than {CODE_BYTES_MAX / 1e6:.0f}"
            f" (the largest file is {largest})",
            "move data out of the packages and send it with --file",
        )
    path = staging / "code.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for member in members:
            data = member.read_bytes()
            info = tarfile.TarInfo(member.relative_to(folder).as_posix())
            info.size = len(data)
            info.mode = 0o644
            archive.addfile(info, io.BytesIO(data))
    return path
