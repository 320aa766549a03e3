"""Go's text/template as far as the project's Ollama templates use it, and what Ollama does with messages before.

`run_go` is the real thing where a Go toolchain is on the PATH; `render` is a stand-in for everywhere else, and a test
compares the two where both are there.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

Messages = Sequence[tuple[str, str]]
TOKEN = re.compile(r"\{\{ (.*?) \}\}", re.DOTALL)
GO_PROGRAM = """package main

import ("encoding/json"; "os"; "text/template")

type Message struct { Role, Content string }
type Case struct { Template, System string; Messages []*Message }

func main() {
	var cases []Case
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil { panic(err) }
	for _, c := range cases {
		t := template.Must(template.New("").Option("missingkey=zero").Parse(c.Template))
		values := map[string]any{"System": c.System, "Messages": c.Messages, "Response": ""}
		if err := t.Execute(os.Stdout, values); err != nil { panic(err) }
		os.Stdout.WriteString("\\x00")
	}
}
"""


def collated(messages: Messages) -> tuple[str, list[tuple[str, str]]]:
    """`.System` and `.Messages`: neighbours of one role become one message."""
    merged: list[tuple[str, str]] = []
    for role, text in messages:
        if merged and merged[-1][0] == role:
            merged[-1] = (role, f"{merged[-1][1]}\n\n{text}")
        else:
            merged.append((role, text))
    return "\n\n".join(text for role, text in messages if role == "system"), merged


def run_go(go: str, folder: Path, cases: Sequence[tuple[str, Messages]]) -> list[str]:
    """Render (template, messages) with Go itself."""
    program = folder / "main.go"
    program.write_text(GO_PROGRAM)
    request = []
    for template, messages in cases:
        system, merged = collated(messages)
        rows = [{"Role": role, "Content": text} for role, text in merged]
        request.append({"Template": template, "System": system, "Messages": rows})
    done = subprocess.run(
        [go, "run", str(program)], input=json.dumps(request).encode(), capture_output=True, check=True
    )
    return done.stdout.decode().split("\0")[:-1]


def render(template: str, messages: Messages) -> str:
    """Render with the stand-in. Raises ValueError at anything that it does not know."""
    system, merged = collated(messages)
    pieces = TOKEN.split(template)  # literal, action, literal, action, …
    nodes = [(kind, text) for pair in zip(["text", "do"] * len(pieces), pieces, strict=False) for kind, text in [pair]]

    def block(at: int, scope: dict[str, object], live: bool) -> tuple[str, int]:
        """Everything up to the `else if` or `end` that closes the block, and where that stands."""
        written = ""
        while at < len(nodes):
            kind, text = nodes[at]
            if kind == "text":
                written += text if live else ""
            elif text == "end" or text.startswith("else if "):
                return written, at
            elif text.startswith("if "):
                taken = False
                while (action := nodes[at][1]) != "end":
                    chosen = live and not taken and truth(action.removeprefix("else ").removeprefix("if "), scope)
                    inner, at = block(at + 1, scope, chosen)
                    written, taken = written + inner, taken or chosen
            elif text == "range $i, $_ := .Messages":
                start = at + 1
                for number in range(len(merged)):
                    inner, at = block(start, {"$i": number}, live)
                    written += inner
                if not merged:
                    _, at = block(start, {"$i": 0}, False)
            elif text == "$last := eq (len (slice $.Messages $i)) 1":
                scope["$last"] = scope["$i"] == len(merged) - 1
            elif live:
                written += value(text, scope)
            at += 1
        return written, at

    def value(text: str, scope: dict[str, object]) -> str:
        if text == ".Content":
            return merged[int(str(scope["$i"]))][1]
        if text == "$.System":
            return system
        if text.startswith('"') and text.endswith('"'):
            return text[1:-1]
        raise ValueError(f"the stand-in knows no {text!r}")

    def truth(text: str, scope: dict[str, object]) -> bool:
        role = merged[int(str(scope["$i"]))][0] if "$i" in scope else ""
        known = {
            "not .System": not system,
            "not $last": not scope.get("$last"),
            'and $last (ne .Role "assistant")': bool(scope.get("$last")) and role != "assistant",
            "and $.System $last": bool(system) and bool(scope.get("$last")),
            "and $.System (le $i 1)": bool(system) and int(str(scope.get("$i", 9))) <= 1,
        } | {f'eq .Role "{name}"': role == name for name in ("system", "user", "assistant")}
        if text not in known:
            raise ValueError(f"the stand-in knows no {text!r}")
        return known[text]

    return block(0, {}, True)[0]
