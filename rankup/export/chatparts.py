"""What a chat template writes around each message, learned from what it renders, and the same as an Ollama template.

Most chat templates are turns: a text before and one after each message, by its role. `learn_parts` renders probe
conversations, cuts the texts at the messages, and then requires that the parts put together again (`ChatParts.render`)
are what the template rendered, for every probe. So a template is known by what it does, not by its name, and one that
does anything else is not known.

What the probes cannot show is not imitated: trimmed white space of a message, tool calls, images, reasoning that is
taken out of earlier answers.

Ollama's templates are Go's text/template. It hands over `.Messages`, with neighbours of one role merged, and `.System`,
all system messages joined (github.com/ollama/ollama, template/template.go).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

Message = tuple[Literal["system", "user", "assistant"], str]
Case = tuple[tuple[Message, ...], bool]
"""A conversation, and whether the beginning of the next answer is asked for."""
Render = Callable[[Sequence[Case]], Sequence[str | None]]
"""Texts of the cases; None where the template raised."""

_S, _U1, _A1, _U2, _A2, _U3 = (f"Zq{name}7xK" for name in ("sys", "usrone", "ansone", "usrtwo", "anstwo", "usrthree"))
_TURNS: Final[tuple[Message, ...]] = (
    ("user", _U1),
    ("assistant", _A1),
    ("user", _U2),
    ("assistant", _A2),
    ("user", _U3),
)
_SYSTEM: Final[Message] = ("system", _S)
CASES: Final[tuple[Case, ...]] = (
    (_TURNS[:1], False),
    (_TURNS[:1], True),
    (_TURNS[:2], False),
    (_TURNS[:3], True),
    (_TURNS, True),
    ((_SYSTEM, *_TURNS[:1]), True),
    ((_SYSTEM, *_TURNS[:3]), True),
    ((_SYSTEM, *_TURNS), True),
)
"""The probes. Those with a system message stand last: a template may refuse them all."""
_WITHOUT_SYSTEM: Final = 5


@dataclass(frozen=True)
class ChatParts:
    """The texts around messages. `system` is None where the template refuses system messages."""

    begin: str
    """Before everything: the mark of a beginning, if the template writes one."""
    no_system: str
    """Where there is no system message: often a whole system message of the template's own."""
    system: tuple[str, str] | None
    user: tuple[str, str]
    assistant: tuple[str, str]
    generation: str
    """After the last message, before the answer."""
    system_in: Literal["turn", "first user", "last user"] = "turn"
    """A system message is a turn of its own, or stands in a user's: before the text, `system[1]` between them."""

    def render(self, messages: Sequence[Message], generate: bool) -> str:
        """What the template is expected to render."""
        users = [number for number, (role, _) in enumerate(messages) if role == "user"]
        held = {"turn": None, "first user": users[0], "last user": users[-1]}[self.system_in]
        system = "".join(text for role, text in messages if role == "system")
        pieces = [self.begin, "" if system else self.no_system]
        for number, (role, text) in enumerate(messages):
            before, after = {"system": self.system or ("", ""), "user": self.user, "assistant": self.assistant}[role]
            if role != "system":
                inner = f"{system}{(self.system or ('', ''))[1]}" if system and number == held else ""
                pieces += [before, inner, text, after]
            elif held is None and self.system is not None:
                pieces += [before, text, after]
        return "".join(pieces) + (self.generation if generate else "")

    def go_template(self, *, with_begin: bool) -> str | None:
        """The same for Ollama; `with_begin` False where the tokenizer writes the beginning. None where Go cannot."""
        texts = (self.begin, self.no_system, *(self.system or ()), *self.user, *self.assistant, self.generation)
        if not all(_is_plain(text) for text in texts):
            return None
        begin, no_system, generation = (_literal(text) for text in (self.begin, self.no_system, self.generation))
        (user, user_end), (answer, answer_end) = (tuple(map(_literal, pair)) for pair in (self.user, self.assistant))
        system, system_end = map(_literal, self.system or ("", ""))
        held = {"first user": "(le $i 1)", "last user": "$last"}.get(self.system_in)
        inner = f"{{{{ if and $.System {held} }}}}{{{{ $.System }}}}{system_end}{{{{ end }}}}" if held else ""
        turn = f"{system}{{{{ .Content }}}}{system_end}" if self.system and not held else ""
        return "".join(
            [
                begin if with_begin else "",
                f"{{{{ if not .System }}}}{no_system}{{{{ end }}}}" if no_system else "",
                "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}",
                f'{{{{ if eq .Role "system" }}}}{turn}',
                f'{{{{ else if eq .Role "user" }}}}{user}{inner}{{{{ .Content }}}}{user_end}',
                f'{{{{ else if eq .Role "assistant" }}}}{answer}{{{{ .Content }}}}',
                f"{{{{ if not $last }}}}{answer_end}{{{{ end }}}}" if answer_end else "",
                "{{ end }}",
                f'{{{{ if and $last (ne .Role "assistant") }}}}{generation}{{{{ end }}}}' if generation else "",
                "{{ end }}",
            ]
        )


def learn_parts(render: Render, begin: str) -> ChatParts | None:
    """The parts of a template that is made of turns; None for any other. `begin` is the tokenizer's mark or ""."""
    texts = render(CASES)
    plain = texts[:_WITHOUT_SYSTEM]
    if any(text is None for text in plain):
        return None
    alone, asked, answered, again = (text or "" for text in plain[:4])
    head, _, user_end = alone.partition(_U1)
    between, _, answer_end = answered.removeprefix(f"{head}{_U1}{user_end}").partition(_A1)
    back = again.removeprefix(f"{head}{_U1}{user_end}{between}{_A1}{answer_end}").partition(_U2)[0]
    if not back or not head.endswith(back) or not asked.startswith(alone):
        return None
    # A mark that begins every turn (SmolLM2's) is part of the turns, whatever the tokenizer calls it.
    written = begin if begin and head.startswith(begin) and begin not in back else ""
    candidates = _with_system(
        texts[_WITHOUT_SYSTEM],
        ChatParts(
            begin=written,
            no_system=head.removeprefix(written).removesuffix(back),
            system=None,
            user=(back, user_end),
            assistant=(between, answer_end),
            generation=asked.removeprefix(alone),
        ),
    )
    shown = texts if texts[_WITHOUT_SYSTEM] is not None else plain
    for parts in candidates:
        if all(parts.render(*case) == text for case, text in zip(CASES, shown, strict=False)):
            return parts
    return None


def _with_system(text: str | None, parts: ChatParts) -> list[ChatParts]:
    """The ways in which the system message of `text`, the shortest probe with one, may have been written."""
    if text is None:
        return [parts]
    head, _, rest = text.removeprefix(parts.begin).partition(_S)
    between = rest.partition(_U1)[0]
    fields = {name: getattr(parts, name) for name in ("begin", "no_system", "user", "assistant", "generation")}
    if between.endswith(parts.user[0]):
        return [ChatParts(**fields, system=(head, between.removesuffix(parts.user[0])))]
    return [ChatParts(**fields, system=("", between), system_in=place) for place in ("first user", "last user")]


def _is_plain(text: str) -> bool:
    """Whether a Modelfile carries the text: its reader drops what cannot be printed, and `\"\"\"` ends a template."""
    return '"""' not in text and all(char.isprintable() or char in "\n\t" for char in text)


def _literal(text: str) -> str:
    """The text in a Go template. No brace stays bare: one before an action would become a part of it."""
    return text.replace("{", '{{ "{" }}')
