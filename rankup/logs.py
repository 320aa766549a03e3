"""How log events are written, the same way in the command, the gateway's replicas, the keeper and the cluster's tasks.

What always holds:
- one event is one line, written by one call, so lines of several processes in one file do not mix;
- an event of a server names its process (`role`, `pid`) and carries the ids that are bound to its context
  (`request_id`, `round_id`, `lease_id`, `worker_id`);
- no secret leaves this module: values under the names of secrets are replaced, and so are passwords in addresses,
  bearer tokens and the signatures of presigned URLs, wherever they stand. Tracebacks carry no local variables.

Read from the environment, because processes of a cluster inherit that from whoever starts them:
`RANKUP_LOG` json or text (servers: text on a terminal, json otherwise; commands: text); `RANKUP_LOG_LEVEL` debug, info,
warning or error (servers: info; commands: warning); `RANKUP_LOG_FILE` a file to append to instead of stderr.

It sends nothing over the network and rotates nothing: any tool that copies and truncates may.
"""

from __future__ import annotations

import io
import logging
import os
import re
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any, Final, TextIO

from rankup.errors import SetupError

FORMS: Final = ("json", "text")
LEVELS: Final = ("debug", "info", "warning", "error")
HIDDEN: Final = "[hidden]"
MAX_DEPTH: Final = 4
"""Below this, a value is shown as text."""

_SECRET_NAMES: Final = re.compile(r"(?i)(^|_)(token|secret|password|passwd|invite|authorization|cookie|private_key)$")
_PATTERNS: Final = (
    (re.compile(r"(?i)\b([a-z][a-z0-9+.\-]*://)[^/\s@'\"]*@"), rf"\1{HIDDEN}@"),
    (re.compile(r"(?i)\b(bearer\s+)[a-z0-9._~+/=\-]+"), rf"\1{HIDDEN}"),
    (
        re.compile(r"(?i)([?&](?:x-amz-signature|x-amz-credential|x-amz-security-token|signature)=)[^&\s'\"]+"),
        rf"\1{HIDDEN}",
    ),
)


def hide_secrets(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A structlog processor: the same event with every secret replaced."""
    for name in event:
        event[name] = HIDDEN if _SECRET_NAMES.search(name) else _clean(event[name], MAX_DEPTH)
    return event


def _clean(value: Any, depth: int) -> Any:
    if isinstance(value, bool | int | float | None):
        return value
    if isinstance(value, Mapping) and depth:
        return {
            str(name): HIDDEN if _SECRET_NAMES.search(str(name)) else _clean(item, depth - 1)
            for name, item in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset) and depth:
        return [_clean(item, depth - 1) for item in value]
    text = value if isinstance(value, str) else str(value)
    for pattern, shown in _PATTERNS:
        text = pattern.sub(shown, text)
    return text


def configure_command(verbose: bool) -> None:
    """Logs of a command that a person types: warnings, or everything with `verbose`.

    Raises SetupError where one of the variables makes no sense.
    """
    _configure(_chosen("RANKUP_LOG", FORMS) or "text", "debug" if verbose else "warning", {})


def configure_server(role: str) -> None:
    """Logs of a process that serves: `role` is "gateway", "keeper", "task" or "server". May be called again.

    Raises SetupError where one of the variables makes no sense or the file cannot be written.
    """
    terminal = sys.stderr.isatty() and not os.environ.get("RANKUP_LOG_FILE")
    form = _chosen("RANKUP_LOG", FORMS) or ("text" if terminal else "json")
    _configure(form, "info", {"role": role, "pid": os.getpid()})


def _chosen(variable: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(variable, "").strip().lower()
    if value and value not in allowed:
        raise SetupError(f"{variable} is {value[:40]!r}", remedy=f"Set it to one of {', '.join(allowed)}, or unset it.")
    return value


def _configure(form: str, level: str, always: Mapping[str, Any]) -> None:
    import structlog

    def with_process(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        for name, value in always.items():
            event.setdefault(name, value)
        return event

    level = _chosen("RANKUP_LOG_LEVEL", LEVELS) or level
    target = _target(os.environ.get("RANKUP_LOG_FILE", ""))
    processors: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        with_process,
    ]
    if form == "json":
        processors += [
            structlog.processors.format_exc_info,
            hide_secrets,
            structlog.processors.JSONRenderer(ensure_ascii=False, default=str),
        ]
    else:
        # The plain formatter: the other ones print local variables.
        plain = structlog.dev.plain_traceback
        colours = target is sys.stderr and target.isatty()
        processors += [hide_but_traceback, structlog.dev.ConsoleRenderer(colors=colours, exception_formatter=plain)]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
        logger_factory=structlog.WriteLoggerFactory(target),
        cache_logger_on_first_use=False,
    )


def hide_but_traceback(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """As `hide_secrets`, with the exception as text, which the console renderer would add after the cleaning."""
    import structlog

    return hide_secrets(logger, method, structlog.processors.format_exc_info(logger, method, event))


def _target(path: str) -> TextIO:
    if not path:
        return sys.stderr
    try:
        if not path.startswith(("/dev/", "/proc/")):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise SetupError(
            f"cannot write the log to {path}: {exc.strerror}", remedy="Correct RANKUP_LOG_FILE, or unset it: stderr."
        ) from exc
    # Unbuffered below, so that a line is one write: appended whole, whoever else writes to the file.
    return io.TextIOWrapper(io.FileIO(descriptor, "a"), encoding="utf-8", errors="replace", write_through=True)
