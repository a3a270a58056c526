"""Families of interchangeable parts, each chosen by `type:` in the job file.

A part is one frozen pydantic config with `type: Literal["name"]` and a `build()`
method, registered where its algorithm is written:

    @CODECS.register
    class IdentityConfig(CodecConfig):
        type: Literal["identity"] = "identity"
        def build(self) -> Codec: ...

and used in a config as

    codec: Annotated[SerializeAsAny[CodecConfig], BeforeValidator(CODECS.parse)]

A module named under `plugins:` in a job registers outside parts the same way.
"""

from __future__ import annotations

import difflib
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticCustomError

__all__ = ["PartConfig", "Registry", "nearest"]


class PartConfig(BaseModel):
    """Base of every registered config: immutable, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


C = TypeVar("C", bound=PartConfig)


def nearest(name: str, known: list[str]) -> str | None:
    """The known name closest to `name`, if any is close."""
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return found[0] if found else None


class Registry(Generic[C]):
    """Maps `type:` names to config classes of one family."""

    def __init__(self, family: str, base: type[C]) -> None:
        self.family = family
        self.base = base
        self._classes: dict[str, type[C]] = {}

    def register(self, cls: type[C]) -> type[C]:
        """Class decorator: make `cls` known by the default of its `type` field."""
        name = cls.model_fields["type"].default
        if not isinstance(name, str):
            raise TypeError(f"{cls.__name__}.type needs a string default")
        if name in self._classes:
            raise ValueError(f"{self.family} {name!r} is already registered")
        self._classes[name] = cls
        return cls

    @property
    def names(self) -> list[str]:
        return sorted(self._classes)

    def get(self, name: str) -> type[C] | None:
        """The config class registered as `name`, if any."""
        return self._classes.get(name)

    def parse(self, value: Any) -> Any:
        """Turn a name, a mapping with `type:` or a built config into a config.

        Raises:
            PydanticCustomError: unknown type; names the known ones and the nearest.
        """
        if isinstance(value, self.base):
            return value
        if isinstance(value, str):
            value = {"type": value}
        if not isinstance(value, dict):
            raise PydanticCustomError(
                "part_shape",
                "expected a {family} name or a mapping with 'type:'",
                {"family": self.family},
            )
        name = value.get("type")
        if not isinstance(name, str) or name not in self._classes:
            guess = nearest(name, self.names) if isinstance(name, str) else None
            raise PydanticCustomError(
                "part_unknown",
                "{problem}; known {family} types: {known}{hint}",
                {
                    "problem": "'type' is missing" if name is None else f"unknown {self.family} {name!r}",
                    "family": self.family,
                    "known": ", ".join(self.names),
                    "hint": f" (did you mean {guess!r}?)" if guess else "",
                },
            )
        return self._classes[name].model_validate(value)
