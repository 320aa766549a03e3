"""A dataset that every machine with Python has: the docstrings of the standard library, as questions and answers.

What always holds:
- a row is a conversational prompt-completion pair of TRL: "What does `os.path.join` do in Python?" and the docstring;
- one row per public qualified name, in sorted order; the same Python gives the same rows, whatever is installed or
  imported: a bare interpreter of its own reads them, since packages change classes of the standard library;
- a class or function that several modules offer is listed under the module that it belongs to, not under each of them;
- modules that open a window, a browser or a prompt when they are imported are left out, and nothing is printed.

It does not clean or deduplicate: `coordinator.dataset` does that. The text is under the licence of Python itself.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

SOURCE = "docstrings of the Python {0.major}.{0.minor} standard library"
LICENCE = "PSF-2.0"
MIN_CHARACTERS = 40
MAX_CHARACTERS = 4000

_SKIPPED = frozenset(
    {
        "antigravity",  # opens a web browser
        "this",  # prints the Zen of Python
        "idlelib",
        "tkinter",
        "turtle",
        "turtledemo",  # these four need a display
        "rlcompleter",  # changes the completion of the interactive prompt
        "site",  # adds `exit` and `help` to the built-ins
        "sitecustomize",
        "usercustomize",
        "test",
        "lib2to3",
        "distutils",
        "pydoc_data",
        "ensurepip",
        "venv",
        "genericpath",
        "ntpath",
        "posixpath",  # offered as os.path
        "nt",
        "posix",  # offered as os
    }
)
_SUBMODULES = (
    "collections.abc",
    "concurrent.futures",
    "email.message",
    "email.utils",
    "html.parser",
    "http.client",
    "http.cookies",
    "http.server",
    "importlib.metadata",
    "importlib.resources",
    "importlib.util",
    "logging.config",
    "logging.handlers",
    "multiprocessing.shared_memory",
    "os.path",
    "unittest.mock",
    "urllib.parse",
    "urllib.request",
    "urllib.robotparser",
    "xml.dom.minidom",
    "xml.etree.ElementTree",
    "xml.sax.saxutils",
)
_HIDDEN_OWNERS = frozenset({"nt", "posix", "ntpath", "posixpath", "genericpath"})


def source() -> str:
    """Where the rows come from, for the dataset's card."""
    return SOURCE.format(sys.version_info)


def question(qualified_name: str) -> str:
    """The question that a row asks about a name such as `os.path.join`."""
    return f"What does `{qualified_name}` do in Python?"


def rows() -> Iterator[dict[str, Any]]:
    """Yield `{"prompt": [user message], "completion": [assistant message]}`, sorted by qualified name."""
    # This file imports the standard library alone, so it needs neither the path of packages (-I) nor their hooks (-S).
    told = subprocess.run([sys.executable, "-I", "-S", __file__], stdout=subprocess.PIPE, check=True).stdout
    for name, text in sorted(json.loads(told).items()):
        yield {
            "prompt": [{"role": "user", "content": question(name)}],
            "completion": [{"role": "assistant", "content": text}],
        }


def documented() -> dict[str, str]:
    """Docstrings by qualified name, as the modules of this process say them."""
    found: dict[str, str] = {}
    with warnings.catch_warnings():
        # Of modules that are imported, and of names that are looked at.
        warnings.simplefilter("ignore")
        for name in sorted({*sys.stdlib_module_names, *_SUBMODULES}):
            if name.startswith("_") or name in _SKIPPED:
                continue
            module = _import_quietly(name)
            if module is not None:
                found.update(_documented_names(name, module))
    return found


def _import_quietly(name: str) -> ModuleType | None:
    """The module, or None where this platform has no such module; prints are swallowed."""
    sink = io.StringIO()
    with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        try:
            return importlib.import_module(name)
        except ImportError:
            return None


def _documented_names(module_name: str, module: ModuleType) -> Iterator[tuple[str, str]]:
    """Yield (qualified name, docstring) of the module, its functions and classes, and the classes' own methods."""
    yield from _documented(module_name, module)
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or not (inspect.isclass(value) or inspect.isroutine(value)):
            continue
        if not _belongs(value, module_name):
            continue
        qualified = f"{module_name}.{name}"
        yield from _documented(qualified, value)
        if not inspect.isclass(value):
            continue
        for member_name, member in sorted(vars(value).items()):
            plain = member.__func__ if isinstance(member, staticmethod | classmethod) else member
            if not member_name.startswith("_") and (inspect.isroutine(plain) or isinstance(plain, property)):
                yield from _documented(f"{qualified}.{member_name}", plain)


def _belongs(value: object, module_name: str) -> bool:
    """Whether a name of the module is its own: defined there, in a part of it, or in a private module behind it."""
    owner = getattr(value, "__module__", None)
    if not isinstance(owner, str):
        return True
    return owner == module_name or owner.startswith((f"{module_name}.", "_")) or owner in _HIDDEN_OWNERS


def _documented(qualified_name: str, value: object) -> Iterator[tuple[str, str]]:
    """Yield the pair if the value has a docstring of its own (not its base class's) of a useful length."""
    if not isinstance(getattr(value, "__doc__", None), str):
        return
    if inspect.isclass(value) and not isinstance(vars(value).get("__doc__"), str):
        return
    text = inspect.getdoc(value)
    if text is not None and MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS:
        yield qualified_name, text


if __name__ == "__main__":
    json.dump(documented(), sys.stdout)
