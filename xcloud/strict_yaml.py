"""YAML for files that people write: no key twice, and numbers are what they look like."""

from __future__ import annotations

import re
from typing import Any

import yaml

__all__ = ["PlainLoader", "StrictDumper", "StrictLoader"]


class StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice and reads 1e-3 as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        merge = "tag:yaml.org,2002:merge"  # `<<` is no key of its own, and may be overridden
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != merge]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


class PlainLoader(StrictLoader):
    """StrictLoader without aliases, which can make much out of little, and without tags."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]  # PyYAML leaves it untyped
        if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None) is not None:
            raise yaml.composer.ComposerError(None, None, "no aliases and tags here", event.start_mark)
        return super().compose_node(parent, index)


class StrictDumper(yaml.SafeDumper):
    """SafeDumper that quotes text which `StrictLoader` would read as a number, and escapes line ends that are not `\\n`."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = '"' if any(end in data for end in "\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


StrictDumper.add_representer(str, StrictDumper.represent_str)

for _side in (StrictLoader, StrictDumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
        list("-+0123456789."),
    )
