"""The child process that renders a chat template on given conversations: `python chatprobe.py < request > answer`.

A chat template is a program that came with a model. It is rendered in Jinja's immutable sandbox, as transformers does
it, and in a process of its own besides, with limits on time and memory: a loop that does not end costs ten seconds.

It needs the standard library and jinja2, and nothing of Rankup. Request: `{"template", "variables", "cases"}`, each
case `{"messages", "add_generation_prompt"}`. Answer: a list with the text of each case, or null where the template
raised. `strftime_now` is not defined: templates that show a date then use a fixed one of their own, or raise.
"""

from __future__ import annotations

import json
import resource
import sys
from typing import Any

CPU_S = 10
MEMORY_BYTES = 1024**3
MAX_TEXT = 64 * 1024


def main() -> None:
    """Read the request, write the answer."""
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value: Any, **options: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False, **options})

    request = json.load(sys.stdin)
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    texts: list[str | None] = []
    for case in request["cases"]:
        try:
            text = environment.from_string(request["template"]).render(**request["variables"], **case)
        except Exception:  # noqa: BLE001 - foreign code: whatever it raises, it did not render
            text = None
        texts.append(text if text is not None and len(text) <= MAX_TEXT else None)
    json.dump(texts, sys.stdout)


if __name__ == "__main__":
    main()
