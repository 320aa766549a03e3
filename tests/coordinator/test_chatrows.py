"""Tools, calls, thoughts and settings of conversations: which are taken, how they come out, what makes rows alike."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.chatrows import MAX_DEPTH, RowError, clean_value
from coordinator.imagerows import clean_row, features, parse_row
from coordinator.rows import encode_row
from rankup.chat import needs

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "What the weather is like",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}, "day": {"type": "string"}}},
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Oslo", "day": "today"}}}
ASKED = {"role": "user", "content": "Is it warm in Oslo?"}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
ANSWERED = {"role": "tool", "name": "weather", "content": '{"celsius": 4}'}
SAID = {"role": "assistant", "content": "No, it is four degrees."}
ROW = {"messages": [ASKED, CALLED, ANSWERED, SAID], "tools": [TOOL]}


def taken(row: dict[str, Any]) -> dict[str, Any]:
    """What becomes of a row of a file: a clean one, whose text is the same when it is read again."""
    cleaned = clean_row(parse_row(json.dumps(row))[1])
    assert cleaned is not None
    text = encode_row(cleaned)
    assert clean_row(parse_row(text)[1]) == cleaned
    assert encode_row(json.loads(text)) == text
    return cleaned


@pytest.mark.parametrize(
    "row",
    [
        ROW,
        {"prompt": [ASKED], "completion": [CALLED], "tools": [TOOL]},
        {"prompt": [ASKED, CALLED, ANSWERED], "chosen": [SAID], "rejected": [CALLED], "tools": [TOOL]},
        {"prompt": [ASKED], "completion": [CALLED], "label": False, "tools": [TOOL]},
        {"messages": [ASKED, SAID | {"reasoning_content": "Four is little."}]},
        {"messages": [ASKED, SAID], "chat_template_kwargs": {"enable_thinking": False, "effort": "low"}},
        {"messages": [ASKED, {**CALLED, "tool_calls": [{"id": "c1", **CALL}]}, {**ANSWERED, "tool_call_id": "c1"}]},
    ],
)
def test_a_row_as_trl_writes_it_comes_out_as_it_is(row: dict[str, Any]) -> None:
    shape, _, extra = parse_row(json.dumps(row))
    assert "tools" not in shape
    assert extra == ()
    assert taken(row) == row


@pytest.mark.parametrize(
    ("changes", "plain"),
    [
        ({"tools": json.dumps([TOOL])}, {}),
        ({"tools": [TOOL["function"]]}, {}),
        ({"messages": [ASKED, {"role": "assistant", "tool_calls": [CALL]}, ANSWERED, SAID]}, {}),
        ({"messages": [ASKED, {**CALLED, "tool_calls": [CALL["function"]]}, ANSWERED, SAID]}, {}),
        (
            {"messages": [ASKED, {**CALLED, "tool_calls": [{"name": "weather", "arguments": '{"town": null}'}]}]},
            {
                "messages": [
                    ASKED,
                    {**CALLED, "tool_calls": [{**CALL, "function": {"name": "weather", "arguments": {}}}]},
                ]
            },
        ),
        # As columnar files have it: every object has the fields of all.
        (
            {
                "messages": [
                    ASKED | {"tool_calls": None, "name": None, "thinking": ""},
                    CALLED | {"name": None, "content": None},
                    ANSWERED | {"tool_calls": []},
                    SAID,
                ],
                "tools": [{"type": "function", "function": {**TOOL["function"], "strict": None}}],
                "chat_template_kwargs": {"enable_thinking": None},
            },
            {},
        ),
    ],
)
def test_other_ways_to_write_tools_become_the_plain_one(changes: dict[str, Any], plain: dict[str, Any]) -> None:
    assert taken(ROW | changes) == ROW | plain


def test_an_empty_answer_of_a_tool_stays_and_of_nobody_else() -> None:
    silent = ANSWERED | {"content": " "}
    assert taken({"messages": [ASKED, CALLED, silent, SAID]})["messages"][2] == ANSWERED | {"content": ""}
    assert clean_row(parse_row(json.dumps({"messages": [ASKED, SAID | {"content": "\t"}]}))[1]) is None


def test_what_a_tool_takes_keeps_its_order_and_the_rest_is_sorted() -> None:
    text = encode_row(taken({"tools": [TOOL], "messages": [ASKED, CALLED]}))
    assert text.startswith('{"messages":[{"content":"Is it warm in Oslo?","role":"user"}')
    assert '"arguments":{"town":"Oslo","day":"today"}' in text
    assert '{"name":"weather","description":"What the weather is like","parameters"' in text


def test_plain_text_has_no_tools() -> None:
    _, row, extra = parse_row(json.dumps({"text": "Hello", "tools": [TOOL]}))
    assert (row, extra) == ({"text": "Hello"}, ("tools",))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tools": "[{"}, "field tools: is text that is not JSON"),
        ({"tools": {"name": "weather"}}, "field tools: is an object, not a list"),
        ({"tools": ["weather"]}, r"field tools\[0\]: is text"),
        ({"tools": [{"type": "function"}]}, r"field tools\[0\]: names no function"),
        (
            {"messages": [ASKED | {"tool_calls": [CALL]}]},
            "field tool_calls; a message of user has role and con",
        ),
        ({"messages": [CALLED | {"tool_calls": CALL}]}, r"field messages\[0\].tool_calls: is an object"),
        ({"messages": [CALLED | {"tool_calls": ["weather"]}]}, r"tool_calls\[0\]: is text"),
        ({"messages": [CALLED | {"tool_calls": [{"function": {}}]}]}, r"tool_calls\[0\]: names no function"),
        (
            {"messages": [CALLED | {"tool_calls": [{"name": "weather", "arguments": "Oslo"}]}]},
            r"tool_calls\[0\].arguments: is text that is not JSON",
        ),
        (
            {"messages": [CALLED | {"tool_calls": [{"name": "weather", "arguments": "[1]"}]}]},
            r"tool_calls\[0\].arguments: is a list",
        ),
        ({"messages": [{"role": "assistant"}]}, r"field messages\[0\].content: is null"),
        ({"messages": [SAID | {"thinking": 7}]}, r"field messages\[0\].thinking: is a number"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "'chat_template' is no setting"),
        ({"chat_template_kwargs": {"tokenize": False}}, "'tokenize' is no setting"),
        ({"chat_template_kwargs": {"a b": 1}}, "'a b' is no setting"),
        ({"chat_template_kwargs": {"effort": [1]}}, "kwargs.effort: is no short text"),
        ({"chat_template_kwargs": {"effort": "x" * 2000}}, "kwargs.effort: is no short text"),
        ({"chat_template_kwargs": {f"s{n}": 1 for n in range(99)}}, "at most 16 settings"),
        ({"chat_template_kwargs": [1]}, "at most 16 settings"),
    ],
)
def test_a_wrong_tool_call_or_setting_is_refused_with_its_field(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(RowError, match=says):
        parse_row(json.dumps(ROW | changes))


@pytest.mark.parametrize("arguments", ['{"x": NaN}', '{"x": -Infinity}', '{"x":' * MAX_DEPTH + "1" + "}" * MAX_DEPTH])
def test_arguments_that_json_cannot_say_or_that_are_too_deep_are_refused(arguments: str) -> None:
    call = {"name": "weather", "arguments": arguments}
    _, row, _ = parse_row(json.dumps({"messages": [CALLED | {"tool_calls": [call]}]}))
    with pytest.raises(RowError, match="tools and arguments"):
        clean_row(row)
    with pytest.raises(RowError, match="more than 32"):
        parse_row(json.dumps(ROW | {"tools": [{"name": "x", "deep": json.loads("[" * 40 + "]" * 40)}]}))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(_JSON)
def test_cleaning_a_value_twice_is_cleaning_it_once(value: Any) -> None:
    cleaned = clean_value(value)
    assert clean_value(cleaned) == cleaned
    json.dumps(cleaned, ensure_ascii=False).encode()


def test_a_row_needs_the_words_that_it_uses() -> None:
    assert needs({"text": "tools"}) == needs({"messages": [ASKED, SAID]}) == frozenset()
    assert needs(ROW) == {"tools", "tool_calls"}
    settings = {"chat_template_kwargs": {"enable_thinking": True}}
    thought = {"prompt": [ASKED], "completion": [SAID | {"thinking": "Hm."}]}
    assert needs(thought | settings) == {"thinking", "enable_thinking"}


def test_rows_are_alike_by_what_is_called_and_thought() -> None:
    row = {"prompt": [ASKED], "completion": [CALLED], "tools": [TOOL]}
    other = {"prompt": [{"role": "user", "content": "Tell me"}], "completion": [CALLED]}
    far = {**CALLED, "tool_calls": [{"name": "weather", "arguments": {"town": "Lima", "day": "Sunday"}}]}
    assert features(taken(row)) & features(taken(other))
    assert not features(taken(other | {"completion": [far]})) & features(taken(row))
    thought = "first I look where the town lies and then what people there call a warm day"
    thinking = [{"completion": [SAID | {"content": str(n) * 9, "thinking": thought}]} for n in (1, 2)]
    one, two = (
        features(taken(other | each | {"prompt": [{"role": "user", "content": "a" * n}]}))
        for n, each in enumerate(thinking, start=1)
    )
    assert one & two
