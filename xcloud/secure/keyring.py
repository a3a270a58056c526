"""A folder of keys: `NAME.key` (private), `NAME.pub` (to hand out) and `NAME.key.old-DATE` (after a rotation)."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from xcloud.errors import KeyFileError
from xcloud.registry import nearest
from xcloud.secure.files import private_folder, sync_folder
from xcloud.secure.identity import NAME, Identity, PublicKey

__all__ = ["Keyring", "default_folder"]


def default_folder() -> Path:
    """`XCLOUD_KEYS`, or `~/.config/xcloud/keys`."""
    chosen = os.environ.get("XCLOUD_KEYS")
    return Path(chosen).expanduser() if chosen else Path.home() / ".config" / "xcloud" / "keys"


class Keyring:
    """The keys in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def names(self) -> list[str]:
        """Whose private keys lie here.

        Raises:
            KeyFileError: the folder cannot be read.
        """
        try:
            found = [
                path.name.removesuffix(".key") for path in self.folder.iterdir() if path.suffix == ".key"
            ]
        except FileNotFoundError:
            return []
        except OSError as problem:
            raise KeyFileError(f"{self.folder}: cannot be read: {problem}") from None
        return sorted(name for name in found if re.fullmatch(NAME, name))

    def key_file(self, name: str) -> Path:
        """Where the private key of `name` lies."""
        return self.folder / f"{name}.key"

    def public_file(self, name: str) -> Path:
        """Where its public key lies."""
        return self.folder / f"{name}.pub"

    def make(self, names: Sequence[str]) -> list[PublicKey]:
        """Make a key for each name: all of them, or none if one exists.

        Raises:
            KeyFileError: a wrong name, one given twice, a key that exists, or a folder open to others.
        """
        for name in names:
            if not re.fullmatch(NAME, name):
                raise KeyFileError(
                    f"{name!r}: a name has letters, digits, '_', '.' and '-', begins with a letter or digit, "
                    "and is 63 long at most"
                )
            if names.count(name) > 1:
                raise KeyFileError(f"{name!r} is given twice")
        private_folder(self.folder)
        for path in (file(name) for name in names for file in (self.key_file, self.public_file)):
            if path.exists():
                raise KeyFileError(
                    f"{path}: exists already, and is not overwritten; "
                    f"`xcloud keys rotate {path.name.removesuffix(path.suffix)}` gives that name a new key"
                )
        return [self._store(Identity.generate(name), replace=False) for name in names]

    def load(self, name: str) -> Identity:
        """The identity of `name`.

        Raises:
            KeyFileError: there is none; names the nearest.
        """
        if name not in self.names():
            guess = nearest(name, self.names())
            hint = f"did you mean {guess!r}?" if guess else f"make it with `xcloud keys make {name}`"
            raise KeyFileError(f"{self.folder}: no key of {name!r} here; {hint}")
        return Identity.load(self.key_file(name))

    def load_all(self, name: str) -> list[Identity]:
        """The identity of `name`, and those that it had before, newest first.

        Raises:
            KeyFileError: there is none, or a file of them cannot be used.
        """
        older = sorted(self.folder.glob(f"{name}.key.old-*"), reverse=True)
        return [self.load(name), *(Identity.load(path, name) for path in older)]

    def public(self, name: str) -> PublicKey:
        """The public key of `name`. A public file that is missing is written anew from the private key.

        Raises:
            KeyFileError: the file is that of another key, or one of the two cannot be used.
        """
        identity = self.load(name)
        if not self.public_file(name).exists():
            PublicKey.of(identity).save(self.public_file(name))
        found = PublicKey.load(self.public_file(name))
        if found.name != name or found.public != identity.public:
            raise KeyFileError(
                f"{self.public_file(name)}: not the public side of {self.key_file(name)}; "
                f"run: xcloud keys rotate {name}"
            )
        return found

    def rotate(self, name: str, now: datetime | None = None) -> tuple[PublicKey, Path]:
        """Give `name` a new key and keep the old one aside. At every moment `NAME.key` is one of the two.

        Returns:
            The new public key, and where the old private key lies.

        Raises:
            KeyFileError: there is no key, or the old one cannot be kept.
        """
        self.load(name)
        private_folder(self.folder)
        stamp = (now or datetime.now(timezone.utc)).strftime("%Y%m%dT%H%M%SZ")
        old = self.folder / f"{name}.key.old-{stamp}"
        try:
            os.link(self.key_file(name), old)
            sync_folder(self.folder)
        except OSError as problem:
            raise KeyFileError(f"{old}: the old key cannot be kept: {problem}; nothing was changed") from None
        return self._store(Identity.generate(name), replace=True), old

    def _store(self, identity: Identity, replace: bool) -> PublicKey:
        public = PublicKey.of(identity)
        identity.save(self.key_file(identity.name), replace)
        public.save(self.public_file(identity.name), replace)
        return public
