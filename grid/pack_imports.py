"""What a script imports: its local modules, which travel along, and the packages it must declare.

Rules this file keeps: nothing is executed; an import that may fail (in a `try` that catches ImportError, or for type
checkers only) is no error; where a declared package may well provide a module under another name, the script gets the
benefit of the doubt: an error here must be one.
"""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from grid.pack_errors import PackError

FILES_MAX = 20_000
"""Files in local packages: more means that a folder of data bears the name of a module."""
DISTRIBUTIONS = {
    "attr": "attrs",
    "Bio": "biopython",
    "bs4": "beautifulsoup4",
    "community": "python-louvain",
    "Crypto": "pycryptodome",
    "cv2": "opencv-python",
    "dateutil": "python-dateutil",
    "docx": "python-docx",
    "dotenv": "python-dotenv",
    "faiss": "faiss-cpu",
    "fitz": "pymupdf",
    "git": "gitpython",
    "igraph": "python-igraph",
    "jose": "python-jose",
    "jwt": "pyjwt",
    "Levenshtein": "levenshtein",
    "magic": "python-magic",
    "mpl_toolkits": "matplotlib",
    "MySQLdb": "mysqlclient",
    "nacl": "pynacl",
    "OpenSSL": "pyopenssl",
    "osgeo": "gdal",
    "PIL": "pillow",
    "pkg_resources": "setuptools",
    "pptx": "python-pptx",
    "psycopg2": "psycopg2-binary",
    "pylab": "matplotlib",
    "pywt": "pywavelets",
    "rapidjson": "python-rapidjson",
    "ruamel": "ruamel-yaml",
    "scikits": "scikit-learn",
    "serial": "pyserial",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "slugify": "python-slugify",
    "snappy": "python-snappy",
    "socks": "pysocks",
    "sqlalchemy": "sqlalchemy",
    "umap": "umap-learn",
    "usb": "pyusb",
    "yaml": "pyyaml",
    "zmq": "pyzmq",
}
"""Modules whose package has another name, the usual ones."""
EQUIVALENTS = {
    "cv2": ("opencv-python-headless", "opencv-contrib-python", "opencv-contrib-python-headless"),
    "psycopg2": ("psycopg2",),
    "Crypto": ("pycrypto",),
    "magic": ("python-magic-bin", "file-magic"),
    "faiss": ("faiss-gpu",),
    "igraph": ("igraph",),
}


@dataclass
class Imports:
    """What was found: local files, and where each foreign module is first needed."""

    files: set[Path] = field(default_factory=set)
    foreign: dict[str, str] = field(default_factory=dict)
    """Dotted name of a module → "file:line"."""


def walk(script: Path, tree: ast.Module) -> Imports:
    """Follow the script's imports through its local modules. Raises PackError: a grid.py in the way, a syntax error."""
    from grid.pack import parse

    script = script.resolve()
    folder = script.parent
    found = Imports()
    queue = [(script, tree, "")]
    seen = {script}
    taken: set[str] = set()
    while queue:
        path, module, package = queue.pop()
        for name, line in _imports(module, package):
            where = f"{path.relative_to(folder)}:{line}"
            top = name.partition(".")[0]
            if top == "grid":
                _check_grid(folder)
                continue
            if top in sys.builtin_module_names or top == "__future__":
                continue
            local = _local(folder, name)
            if local is None:
                if top not in sys.stdlib_module_names and top != "__main__":
                    found.foreign.setdefault(name, where)
                continue
            if top not in taken:
                taken.add(top)
                found.files.update(_whole(folder, top))
            for file, inside in local:
                if file not in seen and file.suffix == ".py":
                    seen.add(file)
                    queue.append((file, parse(file)[1], inside))
    found.files.discard(script)
    return found


def _check_grid(folder: Path) -> None:
    for path in (folder / "grid.py", folder / "grid" / "__init__.py"):
        if path.exists() and not path.samefile(Path(__file__).with_name("__init__.py")):
            shown = path if path.name == "grid.py" else path.parent
            raise PackError(f"{shown} is in the way of the grid package that the script imports", "rename it")


# ---- reading imports -------------------------------------------------------------------------------------------------


def _imports(tree: ast.Module, package: str) -> Iterator[tuple[str, int]]:
    """Yield (absolute dotted name, line) of the imports that must succeed. `package`: where relative ones start."""
    queue: list[tuple[ast.AST, bool]] = [(tree, False)]
    while queue:
        node, guarded = queue.pop()
        if isinstance(node, ast.Import):
            if not guarded:
                yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from _from(node, package, guarded)
        elif isinstance(node, ast.Try | ast.TryStar):
            catches = any(_catches_import_error(handler.type) for handler in node.handlers)
            queue += ((child, guarded or catches) for child in node.body)
            queue += ((child, guarded or catches) for handler in node.handlers for child in handler.body)
            queue += ((child, guarded) for child in (*node.orelse, *node.finalbody))
        elif isinstance(node, ast.If) and _is_type_checking(node.test):
            queue += ((child, guarded) for child in node.orelse)
        elif isinstance(node, ast.With) and any(_suppresses(item.context_expr) for item in node.items):
            queue += ((child, True) for child in node.body)
        else:
            queue += ((child, guarded) for child in ast.iter_child_nodes(node))


def _from(node: ast.ImportFrom, package: str, guarded: bool) -> Iterator[tuple[str, int]]:
    if not node.level:
        base = node.module or ""
    else:
        parts = package.split(".") if package else []
        parts = parts[: len(parts) - (node.level - 1)]
        base = ".".join([*parts, *([node.module] if node.module else [])])
        if not base:
            return
    if guarded and not node.level:
        return
    yield base, node.lineno
    yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names if alias.name != "*")


def _catches_import_error(handler: ast.expr | None) -> bool:
    if handler is None:
        return True
    if isinstance(handler, ast.Tuple):
        return any(map(_catches_import_error, handler.elts))
    return _last_name(handler) in ("ImportError", "ModuleNotFoundError", "Exception", "BaseException")


def _suppresses(expression: ast.expr) -> bool:
    return (
        isinstance(expression, ast.Call)
        and _last_name(expression.func) == "suppress"
        and any(map(_catches_import_error, expression.args))
    )


def _is_type_checking(test: ast.expr) -> bool:
    return _last_name(test) == "TYPE_CHECKING"


def _last_name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


# ---- local modules ---------------------------------------------------------------------------------------------------


def _local(folder: Path, name: str) -> list[tuple[Path, str]] | None:
    """The files that importing the dotted name runs, each with the package it is in; None: not a local module.

    The last part may be an attribute rather than a module.
    """
    files: list[tuple[Path, str]] = []
    here = folder
    parts = name.split(".")
    for position, part in enumerate(parts):
        if (here / part / "__init__.py").is_file():
            here = here / part
            files.append((here / "__init__.py", ".".join(parts[: position + 1])))
        elif (file := here / f"{part}.py").is_file():
            files.append((file, ".".join(parts[:position])))
            break
        elif _extensions(here, part):
            break
        elif (here / part).is_dir() and _has_python(here / part) and (files or part not in sys.stdlib_module_names):
            here = here / part
        elif position == 0:
            return None
        else:
            break
    return files


def _has_python(folder: Path) -> bool:
    """Whether a folder without __init__.py is a namespace package rather than data."""
    return any(folder.glob("*.py")) or any(folder.glob("*/*.py"))


def _extensions(folder: Path, name: str) -> list[Path]:
    return [path for path in folder.glob(f"{name}.*.so") if path.is_file()] + [
        path for path in (folder / f"{name}.so",) if path.is_file()
    ]


def _whole(folder: Path, top: str) -> list[Path]:
    """All files of a local module: a package may read its data, or import by name."""
    if not (folder / top).is_dir():
        return [path for path in (folder / f"{top}.py", *_extensions(folder, top)) if path.is_file()]
    if (folder / f"{top}.py").is_file() and not (folder / top / "__init__.py").is_file():
        return [folder / f"{top}.py"]
    files = []
    for path in (folder / top).rglob("*"):
        relative = path.relative_to(folder)
        if "__pycache__" in relative.parts or any(part.startswith(".") for part in relative.parts):
            continue
        if path.is_file():
            files.append(path)
        if len(files) > FILES_MAX:
            raise PackError(
                f"the local package {top} holds more than {FILES_MAX} files", "move data out of it and send it with --file"
            )
    return files


# ---- foreign modules -------------------------------------------------------------------------------------------------


def candidates(name: str) -> set[str]:
    """Canonical names of distributions that may provide a module of this dotted name."""
    parts = name.split(".")
    top = parts[0]
    names: set[str] = {canonicalize_name("-".join(parts[: count + 1])) for count in range(len(parts))}
    plain = canonicalize_name(top)
    names |= {f"python-{plain}", f"py-{plain}", f"py{plain}", f"{plain}-python", f"{plain}-py", f"{plain}-binary"}
    if top in DISTRIBUTIONS:
        names.add(canonicalize_name(DISTRIBUTIONS[top]))
    names.update(EQUIVALENTS.get(top, ()))
    names.update(map(canonicalize_name, _installed().get(top, ())))
    return names


_installed_cache: dict[str, list[str]] | None = None


def _installed() -> dict[str, list[str]]:
    """Modules of this environment → distributions: an authority where the name is known at all."""
    global _installed_cache
    if _installed_cache is None:
        _installed_cache = {name: list(owners) for name, owners in importlib.metadata.packages_distributions().items()}
    return _installed_cache


def suggestion(name: str) -> str:
    """The distribution to declare for a module."""
    top = name.partition(".")[0]
    if top in DISTRIBUTIONS:
        return DISTRIBUTIONS[top]
    owners = _installed().get(top)
    return owners[0] if owners else canonicalize_name(top)


def check_before(script: Path, found: Imports, requirements: Iterable[Requirement]) -> None:
    """Raise PackError if modules are needed that no declared package can provide. Before dependencies are resolved."""
    if not any(True for _ in requirements):
        _complain(script, found.foreign, found.foreign)


def check_after(script: Path, found: Imports, requirements: Iterable[Requirement], lock: str) -> None:
    """The same with what the dependencies themselves bring along."""
    declared = {canonicalize_name(requirement.name) for requirement in requirements}
    locked = declared | {canonicalize_name(name) for name in re.findall(r"(?m)^([A-Za-z0-9][\w.-]*)\s*(?:==|@)", lock)}
    missing = {name: where for name, where in found.foreign.items() if not candidates(name) & locked}
    provided = {name.partition(".")[0] for name in found.foreign if name not in missing}
    missing = {name: where for name, where in missing.items() if name.partition(".")[0] not in provided}
    used = set().union(*(candidates(name) for name in found.foreign if name not in missing), set())
    if missing and declared <= used:  # else one of the declared may provide it under a name we don't know
        _complain(script, missing, missing)


def _complain(script: Path, missing: dict[str, str], names: Collection[str]) -> None:
    if not missing:
        return
    tops: dict[str, str] = {}
    for name in names:
        tops.setdefault(name.partition(".")[0], missing[name])
    listed = list(tops)
    shown = listed[0] if len(listed) == 1 else ", ".join(listed[:-1]) + " and " + listed[-1]
    where = next(iter(tops.values()))
    which = "which is" if len(listed) == 1 else "which are"
    with_ = " ".join(f"--with {suggestion(top)}" for top in listed)
    raise PackError(
        f"{where} imports {shown}, {which} neither standard, local nor declared",
        f"grid submit {with_} {script}",
    )
