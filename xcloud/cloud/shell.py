"""Shell commands of cluster files, read as far as it takes to know how they start Ray: options, and environment by then.

Words, quotes, comments, operators, assignments, `export`, `unset` and subshells are read as POSIX's "Shell Command Language"
says. Nothing is expanded: a command that hides `ray start` behind a variable is not recognised.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["RayStart", "ray_starts"]

OPERATORS = ";&|()`\n"
ASSIGNMENT = re.compile(r"(?P<name>[A-Za-z_]\w*)=(?P<value>.*)", re.DOTALL)
WRAPPERS = frozenset({"command", "env", "exec", "nice", "nohup", "setsid", "sudo", "time"})
"""Commands that run the rest of their line, with the assignments that stand before it."""
PROGRAMS = frozenset({"ray", "ray.scripts.scripts"})
MENTIONED = re.compile(r"ray(\.scripts\.scripts)?\s+start\b")


@dataclass(frozen=True)
class RayStart:
    """One `ray start`.

    Attributes:
        words: what follows it.
        environment: variables that the command itself sets for it, unexpanded.
    """

    words: tuple[str, ...]
    environment: Mapping[str, str]

    @property
    def options(self) -> dict[str, str]:
        """Options by name, `--NAME VALUE` as well as `--NAME=VALUE`; a flag has an empty value."""
        found = {}
        for place, word in enumerate(self.words):
            name, equals, value = word.partition("=")
            if name.startswith("--"):
                follows = self.words[place + 1] if place + 1 < len(self.words) else "--"
                found[name] = value if equals else "" if follows.startswith("--") else follows
        return found


def ray_starts(command: str) -> list[RayStart]:
    """Every `ray start` of a command, those inside quoted scripts (`bash -c "ray start"`) as well.

    Raises:
        ValueError: a quote has no end.
    """
    return list(_starts(command, {}))


def _starts(command: str, environment: Mapping[str, str]) -> Iterator[RayStart]:
    exported, plain = dict(environment), dict[str, str]()
    outer: list[tuple[dict[str, str], dict[str, str]]] = []
    piped = False
    for words, operator in _simple_commands(command):
        before = dict(exported)
        yield from _of_one(words, exported, plain)
        if piped or operator in ("|", "&"):  # it runs in a shell of its own
            exported = before
        piped = operator == "|"
        if operator == "(":
            outer.append((dict(exported), dict(plain)))
        elif operator == ")" and outer:
            exported, plain = outer.pop()


def _of_one(words: Sequence[str], exported: dict[str, str], plain: dict[str, str]) -> Iterator[RayStart]:
    """What one simple command starts; what it exports, sets and unsets is written into the two mappings."""
    set_here: dict[str, str] = {}
    names = 0  # words that only prepare: assignments, wrappers and their options
    for word in words:
        assigned = ASSIGNMENT.fullmatch(word)
        if assigned:
            set_here[assigned["name"]] = assigned["value"]
        elif word not in WRAPPERS and not word.startswith("-"):
            break
        names += 1
    rest = words[names:]
    if not rest:
        if all(ASSIGNMENT.fullmatch(word) for word in words):
            for name, value in set_here.items():
                (exported if name in exported else plain)[name] = value
        return
    if rest[0] == "export":
        for word in rest[1:]:
            assigned = ASSIGNMENT.fullmatch(word)
            if assigned:
                exported[assigned["name"]] = assigned["value"]
            elif word in plain:
                exported[word] = plain[word]
    elif rest[0] == "unset":
        for word in rest[1:]:
            exported.pop(word, None)
            plain.pop(word, None)
    environment = exported | set_here
    for place, word in enumerate(words):
        after = words[place + 1 :]
        if word.rpartition("/")[2] in PROGRAMS and after:
            start = after.index("start") if "start" in after else -1
            if start == 0 or (start > 0 and after[0].startswith("-")):  # `ray --log-level debug start`
                yield RayStart(tuple(after[start + 1 :]), environment)
                return
    for word in words:
        if MENTIONED.search(word):
            yield from _starts(word, environment)


def _simple_commands(text: str) -> Iterator[tuple[list[str], str]]:
    """Words of each simple command, and the operator behind it; empty at the end."""
    words: list[str] = []
    word: str | None = None
    place, last = 0, len(text)
    while place < last:
        here = text[place]
        if here in "\"'":
            end = _closing(text, place)
            word = (word or "") + _unquoted(text[place + 1 : end], here)
            place = end
        elif here == "\\":
            place += 1
            if place < last and text[place] != "\n":
                word = (word or "") + text[place]
        elif here == "#" and word is None:
            while place + 1 < last and text[place + 1] != "\n":
                place += 1
        elif here == "&" and (text[place - 1 : place] == ">" or text[place + 1 : place + 2] == ">"):
            word = (word or "") + here  # `2>&1`, `&>file`
        elif here in OPERATORS or here.isspace():
            if word is not None:
                words.append(word)
            word = None
            if here in OPERATORS:
                doubled = here in "&|" and text[place + 1 : place + 2] == here
                yield words, here * 2 if doubled else here
                words = []
                place += doubled
        else:
            word = (word or "") + here
        place += 1
    yield [*words, *([word] if word is not None else [])], ""


def _closing(text: str, place: int) -> int:
    """Where the quote that opens at `place` ends."""
    quote, end = text[place], place + 1
    while end < len(text) and text[end] != quote:
        end += 2 if quote == '"' and text[end] == "\\" else 1
    if end >= len(text):
        raise ValueError(f"the quote {text[place : place + 20]!r} has no end")
    return end


def _unquoted(text: str, quote: str) -> str:
    return re.sub(r'\\([\\"$`])', r"\1", text) if quote == '"' else text
