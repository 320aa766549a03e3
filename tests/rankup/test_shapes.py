"""Which rows a method trains on, and which settings have a meaning for them."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from rankup.errors import InputError
from rankup.recipe import Method, Recipe
from rankup.shapes import SHAPES, TRAINED_ON, marks_assistant, require_fit, shape_of


def test_every_method_takes_a_shape_and_every_shape_has_a_method() -> None:
    assert set(TRAINED_ON) == set(get_args(Method))
    assert {shape for shapes in TRAINED_ON.values() for shape in shapes} == set(SHAPES)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_with_the_fields_of_a_shape_and_others_has_that_shape(shape: str) -> None:
    assert shape_of({*SHAPES[shape], "id"}) == shape
    assert shape_of(SHAPES[shape][:-1]) != shape


@pytest.mark.parametrize(
    ("recipe", "shape"),
    [
        ({}, "text"),
        ({}, "prompt-completion chat"),
        ({"packing": True}, "messages"),
        ({"assistant_only": True}, "messages"),
        ({"method": "dpo"}, "preference chat"),
        ({"method": "kto"}, "unpaired"),
        ({"method": "kto", "batch_size": 2}, "preference"),
        ({"method": "distillation"}, "prompt-completion"),
    ],
)
def test_a_recipe_fits_the_rows_that_its_method_takes(recipe: dict[str, Any], shape: str) -> None:
    require_fit(Recipe(**recipe), shape)


@pytest.mark.parametrize(
    ("recipe", "shape", "says", "remedy"),
    [
        ({}, "preference chat", "sft trains on rows of the shape prompt-completion", "Choose the method dpo or kto"),
        ({"method": "dpo"}, "unpaired", "preference, not on unpaired", "Choose the method kto"),
        ({"method": "dpo"}, "text", "not on text", "Choose the method sft"),
        ({"method": "kto"}, "riddles", "not on riddles", "Choose another dataset"),
        ({"method": "dpo", "packing": True}, "preference", "packed for the method sft", "packing to false"),
        ({"assistant_only": True}, "prompt-completion chat", "shape messages", "assistant_only to false"),
        ({"method": "kto", "batch_size": 1}, "unpaired", "a batch of one", "batch_size to 2"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused_with_a_way_out(
    recipe: dict[str, Any], shape: str, says: str, remedy: str
) -> None:
    with pytest.raises(InputError, match=says) as refused:
        require_fit(Recipe(**recipe), shape)
    assert remedy in refused.value.remedy


@pytest.mark.parametrize(
    ("template", "marks"),
    [
        ("{% generation %}x{% endgeneration %}", True),
        ("{%- generation -%}x{%- endgeneration -%}", True),
        ("{% if add_generation_prompt %}x{% endif %}", False),
        ("", False),
        (None, False),
        ({"default": "{% generation %}x{% endgeneration %}", "tool_use": "x"}, True),
        ({"default": "x", "tool_use": "{% generation %}x{% endgeneration %}"}, False),
    ],
)
def test_a_chat_template_marks_the_assistant_with_a_block_of_its_own(template: object, marks: bool) -> None:
    assert marks_assistant(template) is marks
