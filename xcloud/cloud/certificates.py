"""Keys of a Ray cluster: a certificate authority, a certificate for each node, and the token that all of them share.

Ray speaks mutual TLS (`RAY_USE_TLS`): every process shows its node's certificate and takes no peer whose certificate
another authority has signed, or that is not for the address it was called at. Keys are ECDSA on P-256, certificates
X.509 (RFC 5280), files PEM. The authority is for one cluster: whoever holds a node of a Ray cluster can run code on all
of it, so its key may lie on the nodes, which sign their own certificates when an autoscaler has started them.
"""

from __future__ import annotations

import ipaddress
import re
import secrets
import shlex
import socket
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

import psutil
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from xcloud.errors import KeyFileError
from xcloud.secure.files import private_folder, read_file, write_file

__all__ = [
    "AUTHORITY",
    "TOKEN",
    "TOKEN_LENGTH",
    "ClusterKeys",
    "Node",
    "addresses_here",
    "check_certificate",
    "check_token",
    "parse_node",
]

AUTHORITY, TOKEN = "ca", "token"
TOKEN_LENGTH = 64
"""Characters of a token: 256 bits from the system's source of randomness, in hexadecimal."""

NAME = r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
BACKDATED = timedelta(minutes=10)
"""Certificates are valid from a little before they were made: clocks of nodes differ."""


@dataclass(frozen=True)
class Node:
    """A node to make a certificate for.

    Attributes:
        name: of its files.
        addresses: IP addresses and host names that other nodes call it by.
    """

    name: str
    addresses: tuple[str, ...]


def parse_node(text: str) -> Node:
    """`NAME`, `ADDRESS` or `NAME=ADDRESS,ADDRESS`; a name alone is a host name.

    Raises:
        KeyFileError: neither; says what was expected.
    """
    name, equals, rest = text.partition("=")
    addresses = tuple(part.strip() for part in rest.split(",")) if equals else (name,)
    if equals:
        proper = re.fullmatch(NAME, name)
    else:
        proper = re.fullmatch(NAME, name.replace(":", "-"))
        name = name.replace(":", "-")  # of an IPv6 address
    wrong = next(
        (address for address in addresses if not (_ip(address) or re.fullmatch(NAME, address))), None
    )
    if not proper or wrong is not None or name in (AUTHORITY, TOKEN):
        raise KeyFileError(
            f"--node {text}: expected NAME, ADDRESS or NAME=ADDRESS,ADDRESS, where a name has letters, digits, '_', "
            f"'.' and '-', and is neither {AUTHORITY!r} nor {TOKEN!r}"
        )
    return Node(name, addresses)


class ClusterKeys:
    """The keys of one cluster, in a folder for their owner alone.

    `ca.crt` and `ca.key`; `token`; and for each node `NAME.crt`, `NAME.key` and `NAME.env`, which sets Ray's variables.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def make(self, nodes: Sequence[Node], days: int) -> list[str]:
        """Make what is not there yet: authority and token once, and certificates of these nodes anew.

        Args:
            nodes: whose certificates to make; an older one of the same name is replaced.
            days: until they expire. The authority lasts ten years.

        Returns:
            Names of the files written.

        Raises:
            KeyFileError: the folder is open to others, holds half an authority, or cannot be written.
        """
        private_folder(self.folder)
        written = self._make_authority() if not self._file("ca.crt").exists() else []
        if not self._file(TOKEN).exists():
            write_file(self._file(TOKEN), secrets.token_hex(TOKEN_LENGTH // 2).encode(), 0o600)
            written.append(TOKEN)
        for node in nodes:
            written += self._make_node(node, days)
        return written

    def variables(self, name: str) -> dict[str, str]:
        """Ray's environment variables on the node `name`."""
        folder = self.folder.absolute()
        return {
            "RAY_USE_TLS": "1",
            "RAY_TLS_SERVER_CERT": str(folder / f"{name}.crt"),
            "RAY_TLS_SERVER_KEY": str(folder / f"{name}.key"),
            "RAY_TLS_CA_CERT": str(folder / "ca.crt"),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(folder / TOKEN),
        }

    def _file(self, name: str) -> Path:
        return self.folder / name

    def _make_authority(self) -> list[str]:
        if self._file("ca.key").exists():
            raise KeyFileError(
                f"{self._file('ca.key')}: its certificate ca.crt is missing; put it back, or name an empty folder"
            )
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"xcloud cluster {secrets.token_hex(4)}")])
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        certificate = (
            _builder(name, name, key, timedelta(days=3650))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .add_extension(identifier, critical=False)
            .sign(key, hashes.SHA256())
        )
        write_file(self._file("ca.key"), _pem(key), 0o600)
        write_file(self._file("ca.crt"), certificate.public_bytes(serialization.Encoding.PEM), 0o644)
        return ["ca.key", "ca.crt"]

    def _make_node(self, node: Node, days: int) -> list[str]:
        authority = _certificate(self._file("ca.crt"))
        try:
            signer = _private_key(self._file("ca.key"))
        except KeyFileError as problem:
            raise KeyFileError(f"{problem}; only where ca.key lies can certificates be made") from None
        _check_pair(self._file("ca.key"), signer, self._file("ca.crt"), authority)
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = (
            _builder(
                x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, node.name)]),
                authority.subject,
                key,
                timedelta(days=days),
            )
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            .add_extension(x509.SubjectAlternativeName(_alternatives(node.addresses)), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
            )
            .sign(signer, hashes.SHA256())
        )
        exports = [f"export {name}={shlex.quote(value)}" for name, value in self.variables(node.name).items()]
        files = {
            f"{node.name}.key": (_pem(key), 0o600),
            f"{node.name}.crt": (certificate.public_bytes(serialization.Encoding.PEM), 0o644),
            f"{node.name}.env": ("\n".join([*exports, ""]).encode(), 0o600),
        }
        for name, (content, mode) in files.items():
            write_file(self._file(name), content, mode, replace=True)
        return list(files)


def addresses_here() -> list[str]:
    """Every address that this machine may be called by: its host names, and the IP addresses of its interfaces."""
    found = {socket.gethostname(), socket.getfqdn()}
    for interface in psutil.net_if_addrs().values():
        for address in interface:
            if address.family in (socket.AF_INET, socket.AF_INET6):
                found.add(address.address.partition("%")[0])  # without the interface of a link-local one
    return sorted(name for name in found if _ip(name) or re.fullmatch(NAME, name))


def check_certificate(certificate: Path, key: Path, authority: Path, address: str | None) -> datetime:
    """Check that a certificate is valid now, that the key is its own, and that the authority has signed it.

    Args:
        certificate: of this node, PEM.
        key: its private key.
        authority: certificate of the authority.
        address: of this node, which the certificate must be for; None: any.

    Returns:
        When it expires.

    Raises:
        KeyFileError: what is wrong, with the file's name.
    """
    shown, signer = _certificate(certificate), _certificate(authority)
    _check_mode(key)
    _check_pair(key, _any_key(key), certificate, shown)
    now = datetime.now(timezone.utc)
    for path, found in ((certificate, shown), (authority, signer)):
        if found.not_valid_after_utc < now:
            raise KeyFileError(f"{path}: expired on {found.not_valid_after_utc:%Y-%m-%d %H:%M} UTC")
        if found.not_valid_before_utc > now:
            raise KeyFileError(
                f"{path}: not valid before {found.not_valid_before_utc:%Y-%m-%d %H:%M} UTC; look at this machine's clock"
            )
    try:
        shown.verify_directly_issued_by(signer)
    except (ValueError, TypeError, InvalidSignature):
        raise KeyFileError(f"{certificate}: not signed by the authority in {authority}") from None
    if address is not None and address not in _names(shown):
        raise KeyFileError(
            f"{certificate}: is for {', '.join(_names(shown)) or 'no address'}, not for {address}, by which this node "
            "is called"
        )
    return shown.not_valid_after_utc


def check_token(path: Path) -> None:
    """Check that a token's file is for its owner alone, and that nobody guesses it.

    Raises:
        KeyFileError: what is wrong, with the file's name.
    """
    token = read_file(path, KeyFileError, private=True).strip()
    if len(token) < TOKEN_LENGTH // 2:
        raise KeyFileError(
            f"{path}: {len(token)} characters, which can be guessed; expected {TOKEN_LENGTH}, as "
            "`xcloud keys cluster` makes them"
        )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, lasts: timedelta
) -> x509.CertificateBuilder:
    now = datetime.now(timezone.utc)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + lasts)
    )


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _alternatives(addresses: Iterable[str]) -> list[x509.GeneralName]:
    """Loopback as well: processes of one node call each other there."""
    names = dict.fromkeys(["localhost", "127.0.0.1", "::1", *addresses])
    ips = {name: _ip(name) for name in names}
    return [x509.DNSName(name) if ip is None else x509.IPAddress(ip) for name, ip in ips.items()]


def _names(certificate: x509.Certificate) -> list[str]:
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    ips = found.get_values_for_type(x509.IPAddress)
    return [*map(str, ips), *found.get_values_for_type(x509.DNSName)]


def _ip(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _certificate(path: Path) -> x509.Certificate:
    data = read_file(path, KeyFileError)
    try:
        return x509.load_pem_x509_certificate(data)
    except ValueError:
        raise KeyFileError(f"{path}: not a certificate in PEM") from None


def _private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Of an authority that `ClusterKeys` has made."""
    _check_mode(path)
    key = _any_key(path)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise KeyFileError(f"{path}: not an ECDSA key; expected one that `xcloud keys cluster` has made")
    return key


def _any_key(path: Path) -> PrivateKeyTypes:
    data = read_file(path, KeyFileError)
    try:
        return serialization.load_pem_private_key(data, password=None)
    except (ValueError, TypeError):
        raise KeyFileError(f"{path}: not a private key in PEM without a passphrase") from None


def _check_mode(path: Path) -> None:
    """A mounted secret of Kubernetes belongs to root and is read by its group; anything wider is refused."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError:
        raise KeyFileError(f"{path}: no such file") from None
    except OSError as problem:
        raise KeyFileError(f"{path}: cannot be read: {problem}") from None
    if mode & 0o037:
        raise KeyFileError(
            f"{path}: others than its owner can use it (mode {mode:04o}); run: chmod 600 {shlex.quote(str(path))}"
        )


def _check_pair(
    key_file: Path, key: PrivateKeyTypes, certificate_file: Path, certificate: x509.Certificate
) -> None:
    if key.public_key() != certificate.public_key():
        raise KeyFileError(f"{key_file}: not the private key of {certificate_file}")
