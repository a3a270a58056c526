"""`xcloud keys`: make, show and rotate keys, and keep the roster. It only wires and shows, and says what to do next."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from xcloud.secure.identity import PublicKey, Role, Roster
    from xcloud.secure.keyring import Keyring

__all__ = ["keys"]

keys = typer.Typer(
    help="Make, show and rotate the keys of regions, driver and aggregators, and keep the roster that pins them.",
    no_args_is_help=True,
)
roster = typer.Typer(
    help="The roster: which public key belongs to which name, and in which role.", no_args_is_help=True
)
keys.add_typer(roster, name="roster")

Folder = Annotated[
    Path | None,
    typer.Option(
        "--dir", metavar="DIR", help="Folder of keys. Default: XCLOUD_KEYS, or ~/.config/xcloud/keys."
    ),
]
RosterFile = Annotated[Path, typer.Argument(metavar="ROSTER", help="Roster file (JSON).")]
Json = Annotated[bool, typer.Option("--json", help="Write JSON on standard output, and nothing else.")]


@keys.command()
def make(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME...", help="A region, the driver, an aggregator.")
    ],
    folder: Folder = None,
) -> None:
    """Make a key for each name. Each party makes its own, on its own machine."""
    ring = _keyring(folder)
    made = ring.make(names)
    _say(f"made {_count(len(made), 'key')} in {ring.folder}")
    _show_keys(made)
    _next(
        f"{_files(ring.public_file(name) for name in names)} to whoever keeps the roster",
        f"{_files(ring.key_file(name) for name in names)} here: never copy or commit a private key",
        words=("send", "keep"),
    )
    _next_commands(
        "xcloud keys roster make roster.json --driver driver.pub REGION.pub...",
        who="whoever keeps the roster",
    )


@keys.command()
def show(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Default: all.")] = None,
    folder: Folder = None,
    as_json: Json = False,
) -> None:
    """Show public keys. Compare them with their owners by another way than the one the files came."""
    ring = _keyring(folder)
    found = [ring.public(name) for name in names or ring.names()]
    if as_json:
        _print_json({"folder": str(ring.folder), "keys": {public.name: public.key for public in found}})
        return
    if not found:
        _say(f"no keys in {ring.folder}")
        _next_commands("xcloud keys make NAME")
        return
    _say(f"{_count(len(found), 'key')} in {ring.folder}")
    _show_keys(found)


@keys.command()
def rotate(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose key to replace.")], folder: Folder = None
) -> None:
    """Give a name a new key, and keep the old one aside."""
    ring = _keyring(folder)
    public, old = ring.rotate(name)
    _say(f"{name} has a new key in {ring.folder}; the old one is {old.name}")
    _show_keys([public])
    _next(
        f"{_files([ring.public_file(name)])} to whoever keeps the roster, and the new roster to everybody",
        "every process of a run with the new roster; one that has the old roster refuses the new key",
        f"{_files([old])} once no run needs it",
        words=("send", "restart", "delete"),
    )
    _next_commands(f"xcloud keys roster add roster.json {_files([ring.public_file(name)])} --replace")


@roster.command("make")
def roster_make(
    path: RosterFile,
    regions: Annotated[list[Path], typer.Argument(metavar="REGION.pub...", help="Public keys of regions.")],
    driver: Annotated[Path | None, typer.Option(metavar="FILE", help="Public key of the driver.")] = None,
    aggregator: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Public key of an aggregator. Repeatable.")
    ] = None,
) -> None:
    """Make a roster from public key files. Roles are yours to give: no file claims one."""
    from xcloud.secure.identity import Roster  # noqa: PLC0415 - numpy and cryptography; see `_keyring`

    members = [
        *(_member(file, "driver") for file in ([driver] if driver else [])),
        *(_member(file, "aggregator") for file in aggregator or []),
        *(_member(file, "region") for file in regions),
    ]
    made = Roster.of(members, str(path))
    made.save(path)
    _show_roster(path, made)
    _next_roster(path, made)


@roster.command("add")
def roster_add(
    path: RosterFile,
    public: Annotated[Path, typer.Argument(metavar="NAME.pub", help="Public key file.")],
    role: Annotated[
        Literal["driver", "aggregator", "region"] | None,
        typer.Option(help="Default: the one that the name has, or region."),
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace the key that the name has now.")
    ] = False,
) -> None:
    """Add a public key, or replace one after a rotation."""
    from xcloud.secure.identity import Roster  # noqa: PLC0415 - numpy and cryptography; see `_keyring`

    before = Roster.load(path)
    member = _member(public, "region")
    known = {other.name: other for other in before.members}
    if replace and member.name not in known:
        raise typer.BadParameter(f"{member.name!r} is not in {path}; leave --replace out to add it")
    if not replace and member.name in known:
        raise typer.BadParameter(f"{member.name!r} is in {path} already; --replace gives it this key")
    had = known[member.name].role if replace else member.role
    member = member.model_copy(update={"role": role or had})
    made = Roster.of([*(other for other in before.members if other.name != member.name), member], str(path))
    made.save(path, replace=True)
    _show_roster(path, made)
    _next_roster(path, made)


@roster.command("remove")
def roster_remove(
    path: RosterFile, name: Annotated[str, typer.Argument(metavar="NAME", help="Who leaves.")]
) -> None:
    """Take a name out of the roster."""
    from xcloud.secure.identity import Roster  # noqa: PLC0415 - numpy and cryptography; see `_keyring`

    before = Roster.load(path)
    before.member(name)
    made = Roster.of((other for other in before.members if other.name != name), str(path))
    made.save(path, replace=True)
    _show_roster(path, made)
    _next_roster(path, made)


@roster.command("show")
def roster_show(path: RosterFile, as_json: Json = False) -> None:
    """Show a roster and its fingerprint, which all parties must see alike."""
    from xcloud.secure.identity import Roster  # noqa: PLC0415 - numpy and cryptography; see `_keyring`

    found = Roster.load(path)
    if as_json:
        _print_json({"fingerprint": found.hash.hex(), **found.model_dump(mode="json")})
        return
    _show_roster(path, found)


@keys.command()
def cluster(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder of the cluster's keys; made if it is not there.")
    ],
    nodes: Annotated[
        list[str] | None,
        typer.Option(
            "--node",
            metavar="NODE",
            help="Make a certificate for NAME, for ADDRESS, or for NAME=ADDRESS,ADDRESS. Repeatable.",
        ),
    ] = None,
    here: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Make one for all addresses of this machine, under this name."),
    ] = None,
    days: Annotated[int, typer.Option(min=1, max=3650, help="Until certificates of nodes expire.")] = 365,
    as_json: Json = False,
) -> None:
    """Make what secures a Ray cluster: an authority, a token, and a certificate for each node."""
    # Here, because it loads cryptography, and `xcloud --help` should not wait for that.
    from xcloud.cloud.certificates import ClusterKeys, Node, addresses_here, parse_node  # noqa: PLC0415

    wanted = [parse_node(node) for node in nodes or ()]
    if here is not None:
        wanted.append(Node(parse_node(here).name, tuple(addresses_here())))
    made = ClusterKeys(folder)
    written = made.make(wanted, days)
    variables = {node.name: made.variables(node.name) for node in wanted}
    if as_json:
        _print_json({"folder": str(folder), "written": written, "variables": variables})
        return
    _say(f"{_count(len(written), 'file')} written in {folder}: {', '.join(written) or 'nothing was missing'}")
    for node in wanted:
        _say(f"{node.name}: for {', '.join(node.addresses)}")
        for name, value in variables[node.name].items():
            _say(f"  export {name}={shlex.quote(value)}")
    _console().print("next", style="bold")
    for node in wanted:
        _say(
            f"  run      . {shlex.quote(str(folder / f'{node.name}.env'))}  (on {node.name}, before Ray starts)"
        )
    if not wanted:
        _next_commands(f"xcloud keys cluster {shlex.quote(str(folder))} --here node", who="on each node")
    _say("  keep     the folder for its owner alone: whoever has ca.key or token is let in everywhere")


def _keyring(folder: Path | None) -> Keyring:
    # Here, because it loads numpy and cryptography, and `xcloud --help` should not wait for that.
    from xcloud.secure.keyring import Keyring, default_folder  # noqa: PLC0415

    return Keyring(folder or default_folder())


def _member(file: Path, role: Role) -> Any:
    from xcloud.secure.identity import Member, PublicKey  # noqa: PLC0415 - see `_keyring`

    public = PublicKey.load(file)
    return Member(name=public.name, role=role, key=public.key)


def _show_keys(found: Sequence[PublicKey]) -> None:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 3, 0, 0))
    table.add_column("  name")
    table.add_column("public key")
    for public in found:
        table.add_row(f"  {public.name}", _in_rows(public.public))
    _console().print(table)


def _show_roster(path: Path, shown: Roster) -> None:
    _say(f"{path}: {_count(len(shown.members), 'member')}")
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 3, 0, 0))
    for title in ("  name", "role", "public key"):
        table.add_column(title)
    for member in shown.members:
        table.add_row(f"  {member.name}", member.role, _in_rows(member.public))
    table.add_row("")
    table.add_row("  fingerprint", "", _in_rows(shown.hash), style="bold")
    _console().print(table)


def _next_roster(path: Path, made: Roster) -> None:
    _next(
        "the fingerprint with every party, by phone or in person",
        "the file to every party; nothing in it is secret",
        words=("compare", "send"),
    )
    if not made.names("driver"):
        _next_commands(
            f"xcloud keys roster add {_files([path])} driver.pub --role driver  (there is none yet)"
        )


def _in_rows(value: bytes) -> str:
    """A fingerprint in two rows, so that it fits beside a name on a narrow terminal."""
    from xcloud.secure.identity import fingerprint  # noqa: PLC0415 - see `_keyring`

    return f"{fingerprint(value[:16])}\n{fingerprint(value[16:])}"


def _files(paths: Any) -> str:
    return shlex.join(str(path) for path in paths)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _next(*steps: str, words: Sequence[str]) -> None:
    _console().print("next", style="bold")
    for word, step in zip(words, steps, strict=True):
        _say(f"  {word:8} {step}")


def _next_commands(*commands: str, who: str = "") -> None:
    for command in commands:
        _say(f"  run      {command}" + (f"  ({who})" if who else ""))


def _say(line: str) -> None:
    """One line that is never folded, so that paths and commands in it can be copied."""
    _console().print(line, soft_wrap=True, markup=False)


def _console() -> Console:
    return Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, allow_nan=False))
