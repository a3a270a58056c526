"""Who is who: Ed25519 identities, and the roster that pins them.

An `Identity` is the private key of a region, of the driver or of an aggregator, in a PEM file (PKCS #8, so that
`openssl pkey` and secret scanners know it). Its public key travels in a small JSON file beside it, signed by
itself. A `Roster` says which public key belongs to which name, and in which role. It is made out of band and never
taken from the network: whoever could write it could be anybody. Everybody must hold the same one, which its hash shows.

Source: Ed25519 RFC 8032; PKCS #8 for it RFC 8410.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from xcloud.errors import ForeignKeyError, KeyFileError, SecurityError
from xcloud.secure.files import explain, parse_json, read_file, write_file
from xcloud.secure.primitives import Field as Signed
from xcloud.secure.primitives import digest, hkdf, public_of, sign, verify

__all__ = ["NAME", "Identity", "Member", "PublicKey", "Role", "Roster", "fingerprint"]

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$"
"""Names of regions, as in a job file, and of the driver and aggregators."""

Role = Literal["driver", "aggregator", "region"]

PROOF = "xcloud/public-key/v1"
ROSTER = "xcloud/roster/v1"

_P = 2**255 - 19
_Y8 = int.from_bytes(
    bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"), "little"
)
_SMALL_ORDER = {0, 1, _P - 1, _P, _P + 1, _Y8, _P - _Y8}
"""y-coordinates of points of small order, canonical or not. OpenSSL verifies signatures under them that anybody can make."""


def _usable(key: str) -> str:
    if int.from_bytes(bytes.fromhex(key), "little") % 2**255 in _SMALL_ORDER:
        raise ValueError("a key of small order: anybody can sign for it")
    return key


Name = Annotated[str, Field(pattern=NAME)]
KeyHex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$"), AfterValidator(_usable)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Member(_Record):
    """One line of a roster. `key` is the Ed25519 public key, 64 hexadecimal digits."""

    name: Name
    role: Role
    key: KeyHex

    @classmethod
    def of(cls, identity: Identity, role: Role) -> Member:
        """The line of an identity."""
        return cls(name=identity.name, role=role, key=identity.public.hex())

    @property
    def public(self) -> bytes:
        return bytes.fromhex(self.key)


class PublicKey(_Record):
    """What an identity hands out. `proof` is its own signature: that it has the private key, and no digit is wrong."""

    version: Literal[1] = 1
    name: Name
    key: KeyHex
    proof: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]

    @classmethod
    def of(cls, identity: Identity) -> PublicKey:
        """The public side of an identity."""
        proof = identity.sign(PROOF, identity.name, identity.public)
        return cls(name=identity.name, key=identity.public.hex(), proof=proof.hex())

    @classmethod
    def parse(cls, data: bytes, origin: str) -> PublicKey:
        """Read one; `origin` names it in errors.

        Raises:
            KeyFileError: not a public key file, or not signed by its own key.
        """
        found = parse_json(cls, data, origin, KeyFileError)
        if not found.proved:
            raise KeyFileError(f"{origin}: proof: not signed by its own key; ask {found.name} for it anew")
        return found

    @property
    def proved(self) -> bool:
        """Whether it is signed by its own key."""
        try:
            verify(self.public, bytes.fromhex(self.proof), self.name, PROOF, self.name, self.public)
        except SecurityError:
            return False
        return True

    @classmethod
    def load(cls, path: Path) -> PublicKey:
        """Read one from a file, with the errors of `parse`."""
        return cls.parse(read_file(path, KeyFileError), str(path))

    def save(self, path: Path, replace: bool = False) -> None:
        """Write it, readable by all.

        Raises:
            KeyFileError: see `write_file`.
        """
        write_file(path, self.model_dump_json(indent=2).encode() + b"\n", 0o644, replace)

    @property
    def public(self) -> bytes:
        return bytes.fromhex(self.key)


class Identity:
    """A private key and the name it stands for."""

    def __init__(self, name: str, key: Ed25519PrivateKey) -> None:
        self.name = name
        self._key = key

    @classmethod
    def generate(cls, name: str) -> Identity:
        """A fresh one, from the operating system's randomness."""
        return cls(name, Ed25519PrivateKey.generate())

    @classmethod
    def parse(cls, name: str, data: bytes, origin: str) -> Identity:
        """From PEM; `origin` names it in errors.

        Raises:
            KeyFileError: no Ed25519 key in PEM, or one behind a passphrase.
        """
        try:
            key = load_pem_private_key(data, password=None)
        except TypeError:
            raise KeyFileError(
                f"{origin}: behind a passphrase, which nobody could type on a cluster; expected a plain Ed25519 key"
            ) from None
        except (ValueError, UnsupportedAlgorithm):
            raise KeyFileError(f"{origin}: not a private key in PEM (PKCS #8, Ed25519)") from None
        if not isinstance(key, Ed25519PrivateKey):
            raise KeyFileError(f"{origin}: a key of another kind ({type(key).__name__}); expected Ed25519")
        return cls(name, key)

    def derive(self, label: str, *fields: Signed) -> bytes:
        """32 bytes that only who has this key can make, for the one purpose that label and fields name (HKDF)."""
        return hkdf(self._key.private_bytes_raw(), b"", label, self.name, *fields)

    @classmethod
    def load(cls, path: Path, name: str | None = None) -> Identity:
        """From `NAME.key`, a file that only its owner can read; `name` where the file is called otherwise.

        Raises:
            KeyFileError: also if others can read it; says what to run.
        """
        return cls.parse(
            name or path.name.removesuffix(".key"), read_file(path, KeyFileError, private=True), str(path)
        )

    def save(self, path: Path, replace: bool = False) -> None:
        """Write it for its owner alone.

        Raises:
            KeyFileError: see `write_file`.
        """
        pem = self._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        write_file(path, pem, 0o600, replace)

    @property
    def public(self) -> bytes:
        """The 32 bytes of its public key."""
        return public_of(self._key)

    def sign(self, label: str, *fields: Signed) -> bytes:
        """A 64-byte signature over the labelled fields."""
        return sign(self._key, label, *fields)


class Roster(_Record):
    """Names, their keys and roles, in the order of their names. Names and keys are unique, and there is one driver at most."""

    version: Literal[1] = 1
    members: Annotated[tuple[Member, ...], Field(strict=False)] = ()

    @model_validator(mode="after")
    def _unique(self) -> Roster:
        seen: dict[str, int] = {}
        for index, member in enumerate(self.members):
            for kind, value in (("name", member.name), ("key", member.key)):
                if value in seen:
                    raise ValueError(
                        f"members.{index}.{kind}: {value!r} is that of members.{seen[value]} already"
                    )
                seen[value] = index
        drivers = [member.name for member in self.members if member.role == "driver"]
        if len(drivers) > 1:
            raise ValueError(f"members: {len(drivers)} drivers ({', '.join(drivers)}); expected one")
        return self

    @classmethod
    def of(cls, members: Iterable[Member], origin: str = "roster") -> Roster:
        """Of members in any order.

        Raises:
            KeyFileError: names or keys that are not unique.
        """
        try:
            return cls(members=tuple(sorted(members, key=lambda member: member.name)))
        except ValidationError as problem:
            raise KeyFileError(f"{origin}: {explain(problem)}") from None

    @classmethod
    def parse(cls, data: bytes, origin: str) -> Roster:
        """From JSON; `origin` names it in errors.

        Raises:
            KeyFileError: names the key, and what was expected.
        """
        return cls.of(parse_json(cls, data, origin, KeyFileError).members, origin)

    @classmethod
    def load(cls, path: Path) -> Roster:
        """From a file that only its owner can change, with the errors of `parse`."""
        return cls.parse(read_file(path, KeyFileError, pinned=True), str(path))

    def save(self, path: Path, replace: bool = False) -> None:
        """Write it, readable by all.

        Raises:
            KeyFileError: see `write_file`.
        """
        write_file(path, self.model_dump_json(indent=2).encode() + b"\n", 0o644, replace)

    @property
    def hash(self) -> bytes:
        """What two holders compare: 32 bytes that stand for all names, roles and keys."""
        return digest(ROSTER, *((member.name, member.role, member.public) for member in self.members))

    def names(self, role: Role) -> tuple[str, ...]:
        """Who has the role."""
        return tuple(member.name for member in self.members if member.role == role)

    def member(self, name: str, role: Role | None = None) -> Member:
        """The member of that name.

        Raises:
            ForeignKeyError: there is none, or it has another role than the one asked for.
        """
        found = next((member for member in self.members if member.name == name), None)
        if found is None:
            raise ForeignKeyError(
                f"{name!r} is not in the roster; it names {', '.join(self._names()) or 'nobody'}"
            )
        if role is not None and found.role != role:
            raise ForeignKeyError(f"{name!r} is {found.role} in the roster; expected {role}")
        return found

    def verify(self, name: str, signature: bytes, label: str, *fields: Signed) -> None:
        """Check the signature of `name` over the labelled fields.

        Raises:
            ForeignKeyError: nobody of that name is in the roster.
            SecurityError: the signature is not by that key, or over something else.
        """
        verify(self.member(name).public, signature, name, label, *fields)

    def _names(self) -> list[str]:
        return [member.name for member in self.members]


def fingerprint(value: bytes) -> str:
    """Hexadecimal digits in groups of eight, to be compared by eye or read out."""
    digits = value.hex()
    return " ".join(digits[start : start + 8] for start in range(0, len(digits), 8))
