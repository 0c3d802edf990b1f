"""Addresses to listen on, for the worker and the site."""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from pairtune.errors import BadInput

# The key that requests to a worker must carry. An environment variable, since other users can read a command's
# arguments.
KEY = "PAIRTUNE_API_KEY"

_MOST = 65_535


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def own_names(host: str) -> list[str]:
    """The names by which this machine may be asked for when it listens on `host`: what a Host header may say.

    Anything else may be a page of another site whose name was made to lead here (DNS rebinding).
    """
    names = ["127.0.0.1", "localhost", "[::1]"]
    if is_loopback(host):
        return names
    found = [host]
    if host in ("0.0.0.0", "::"):  # noqa: S104 - asked for
        addresses = [each.address.partition("%")[0] for all_ in psutil.net_if_addrs().values() for each in all_]
        found = [socket.gethostname(), socket.getfqdn(), *filter(_is_address, addresses)]
    return list(dict.fromkeys([*names, *map(in_address, found)]))


def in_address(host: str) -> str:
    """A host as it stands in a URL: IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens already, so that clients wait until the server is up, and nothing slow is done in vain.

    Args:
        host: a name or address of this machine.
        port: the port; 0: any free one.

    Raises:
        BadInput: the address is taken, or none of this machine's.
    """
    if not 0 <= port <= _MOST:
        raise BadInput(f"--port {port}: a port is a number from 0 to {_MOST}; 0 takes any free one")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With an explicit IPPROTO_TCP, or asyncio does not set TCP_NODELAY and every page takes 40 ms longer.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((host, port))
            bound.listen(128)
        except (OSError, UnicodeError) as error:
            if isinstance(error, OSError) and error.errno in (errno.EADDRINUSE, errno.EACCES):
                raise BadInput(
                    f"--port {port}: cannot listen on {host}:{port} ({error.strerror}); choose another port"
                ) from error
            raise BadInput(
                f"--host {host}: is no address of this machine; use 127.0.0.1, or 0.0.0.0 for all"
            ) from error
        yield bound
