"""Families of parts: registered, looked up, parsed, and refused by name."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from xcloud.registry import PartConfig, Registry, nearest


class ToolConfig(PartConfig):
    type: str


class HammerConfig(ToolConfig):
    type: Literal["hammer"] = "hammer"
    weight: int = 3


class SawConfig(ToolConfig):
    type: Literal["saw"] = "saw"
    teeth: int


@pytest.fixture
def tools() -> Registry[ToolConfig]:
    registry: Registry[ToolConfig] = Registry("tool", ToolConfig)
    registry.register(SawConfig)
    assert registry.register(HammerConfig) is HammerConfig
    return registry


def test_names_and_classes(tools: Registry[ToolConfig]) -> None:
    assert tools.names == ["hammer", "saw"]
    assert tools.get("saw") is SawConfig
    assert tools.get("drill") is None


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("hammer", HammerConfig()),
        ({"type": "hammer"}, HammerConfig()),
        ({"type": "hammer", "weight": 5}, HammerConfig(weight=5)),
        ({"type": "saw", "teeth": 9}, SawConfig(teeth=9)),
        (HammerConfig(weight=1), HammerConfig(weight=1)),
    ],
    ids=str,
)
def test_parse(tools: Registry[ToolConfig], value: Any, expected: ToolConfig) -> None:
    assert tools.parse(value) == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("hamer", "unknown tool 'hamer'; known tool types: hammer, saw (did you mean 'hammer'?)"),
        ("zzz", "unknown tool 'zzz'; known tool types: hammer, saw"),
        ({"type": "swa"}, "unknown tool 'swa'; known tool types: hammer, saw (did you mean 'saw'?)"),
        ({"type": 3}, "unknown tool 3; known tool types: hammer, saw"),
        ({"weight": 5}, "'type' is missing; known tool types: hammer, saw"),
    ],
    ids=str,
)
def test_an_unknown_type_names_the_known_ones(tools: Registry[ToolConfig], value: Any, message: str) -> None:
    with pytest.raises(PydanticCustomError) as caught:
        tools.parse(value)
    assert str(caught.value) == message


@pytest.mark.parametrize("value", [None, 3, ["hammer"], PartConfig()], ids=str)
def test_what_is_neither_name_nor_mapping_is_refused(tools: Registry[ToolConfig], value: Any) -> None:
    with pytest.raises(PydanticCustomError, match="tool name or a mapping with 'type:'"):
        tools.parse(value)


def test_a_missing_type_is_not_guessed_at(tools: Registry[ToolConfig]) -> None:
    """Whatever the parts are called: nothing was written that one of them could be near to."""

    class NoneConfig(ToolConfig):
        type: Literal["none"] = "none"

    class NonesConfig(ToolConfig):
        type: Literal["Nones"] = "Nones"

    tools.register(NoneConfig)
    tools.register(NonesConfig)
    with pytest.raises(PydanticCustomError) as caught:
        tools.parse({"weight": 5})
    assert "did you mean" not in str(caught.value)


def test_unknown_and_missing_keys_keep_their_path(tools: Registry[ToolConfig]) -> None:
    with pytest.raises(ValidationError) as caught:
        tools.parse({"type": "saw", "tooth": 9})
    assert {(e["loc"], e["type"]) for e in caught.value.errors()} == {
        (("teeth",), "missing"),
        (("tooth",), "extra_forbidden"),
    }


def test_a_name_is_registered_once(tools: Registry[ToolConfig]) -> None:
    with pytest.raises(ValueError, match="tool 'saw' is already registered"):
        tools.register(SawConfig)


def test_a_part_needs_a_name(tools: Registry[ToolConfig]) -> None:
    class Nameless(ToolConfig):
        pass

    with pytest.raises(TypeError, match=r"Nameless\.type needs a string default"):
        tools.register(Nameless)


def test_parts_are_immutable() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        HammerConfig().weight = 4


@pytest.mark.parametrize(
    ("name", "expected"), [("worker", "workers"), ("wrokers", "workers"), ("x", None), ("", None)]
)
def test_nearest(name: str, expected: str | None) -> None:
    assert nearest(name, ["micro_batch", "workers", "zero_stage"]) == expected
