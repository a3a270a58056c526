"""Nothing of a run goes to a cluster in the clear: the rule that a session keeps before it joins one.

An address on loopback needs nothing. Any other needs mutual TLS (`RAY_USE_TLS` with a certificate for this node, its
key and the authority) and a token (`RAY_AUTH_MODE`). Ray itself meets wrong files with time-outs of half a minute and
more, so they are looked at first. Ray's TLS does not cover the dashboard and the Jobs API, which are plain HTTP.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping
from pathlib import Path

from xcloud.cloud.certificates import check_certificate, check_token
from xcloud.errors import KeyFileError, SecurityError

__all__ = ["check_cluster", "is_loopback"]

MAKE = "make them with `xcloud keys cluster DIR --here node` and set what `. DIR/node.env` sets"
OTHERWISE = "or spell out --insecure"
FILES = {
    "RAY_TLS_SERVER_CERT": "certificate",
    "RAY_TLS_SERVER_KEY": "private key",
    "RAY_TLS_CA_CERT": "certificate of the authority",
}


def check_cluster(host: str, environ: Mapping[str, str]) -> None:
    """Refuse a cluster that others could listen to or enter.

    Args:
        host: IP address or name of its head.
        environ: environment of this process, which Ray reads.

    Raises:
        SecurityError: names the variable or file, what was expected and the command that makes it.
    """
    if is_loopback(host):
        return
    where = f"the Ray cluster at {host} is not on loopback"
    if environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        raise SecurityError(
            f"{where}, and RAY_USE_TLS is {environ.get('RAY_USE_TLS', 'not set')}; expected RAY_USE_TLS=1 with "
            f"{', '.join(FILES)}; {MAKE}, {OTHERWISE}"
        )
    for name, what in FILES.items():
        if not environ.get(name):
            raise SecurityError(
                f"{where}, and {name} is not set; expected the file of a {what}; {MAKE}, {OTHERWISE}"
            )
    paths = [Path(environ[name]) for name in FILES]
    try:
        check_certificate(paths[0], paths[1], paths[2], address=address_towards(host))
    except KeyFileError as problem:
        raise SecurityError(f"{where}: RAY_TLS_*: {problem}; {MAKE}, {OTHERWISE}") from None
    if environ.get("RAY_AUTH_MODE", "").lower() != "token":
        raise SecurityError(
            f"{where}, and RAY_AUTH_MODE is {environ.get('RAY_AUTH_MODE', 'not set')}; expected token, with "
            f"RAY_AUTH_TOKEN_PATH; {MAKE}, {OTHERWISE}"
        )
    if environ.get("RAY_AUTH_TOKEN"):
        return  # given by a secret store, as KubeRay does
    token = environ.get("RAY_AUTH_TOKEN_PATH")
    if not token:
        raise SecurityError(
            f"{where}, and RAY_AUTH_TOKEN_PATH is not set; expected the file of the cluster's token, mode 0600; "
            f"{MAKE}, {OTHERWISE}"
        )
    try:
        check_token(Path(token))
    except KeyFileError as problem:
        raise SecurityError(f"{where}: RAY_AUTH_TOKEN_PATH: {problem}; {MAKE}, {OTHERWISE}") from None


def is_loopback(host: str) -> bool:
    """Whether a host is reached without leaving this machine, by all of its addresses.

    Raises:
        SecurityError: its name cannot be resolved.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as problem:
        raise SecurityError(
            f"{host}: cannot be resolved ({problem}), so it is not known to be on loopback"
        ) from None
    return all(ipaddress.ip_address(str(entry[4][0]).partition("%")[0]).is_loopback for entry in found)


def address_towards(host: str) -> str:
    """This machine's own address on the way to a host, by which the host's processes call it back."""
    family, kind, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:  # sends nothing: only the route is looked up
        probe.connect(target)
        return str(probe.getsockname()[0])
