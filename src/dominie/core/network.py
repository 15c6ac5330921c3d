"""Proxies and certificates that variables of the environment name for connections."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import ssl
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies_environment, proxy_bypass

from dominie.core.errors import InputError

_SOCKS = ("socks5", "socks5h")


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, to which no proxy leads."""
    name = host.lower().rstrip(".")
    try:
        address = ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")
    mapped = getattr(address, "ipv4_mapped", None)
    return address.is_loopback or address.is_unspecified or bool(mapped and mapped.is_loopback)


def check_variables() -> None:
    """Refuse variables of the environment under which no connection can be made.

    Raises:
        InputError: names the variable, and the file or proxy.
    """
    _check_certificates()
    for kind in getproxies_environment():
        if kind in ("http", "https", "all"):
            _check_proxy(*_variable(kind))


def _check_certificates() -> None:
    file, folders = os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")
    if file:
        try:
            ssl.create_default_context(cafile=file)
        except OSError as error:
            raise InputError(
                "no certificates can be read from the file that the environment names",
                where="environment variable SSL_CERT_FILE",
                expected="a PEM file of certificate authorities",
                found=f"{file}: {error.strerror or error}",
                do="correct the variable, or unset it",
            ) from None
    elif folders and not any(Path(each).is_dir() for each in folders.split(os.pathsep)):
        raise InputError(
            "there is no folder of certificates where the environment names one",
            where="environment variable SSL_CERT_DIR",
            expected="a folder of certificate authorities",
            found=folders,
            do="correct the variable, or unset it",
        )


def _check_proxy(variable: str, value: str) -> None:
    """Refuse a proxy that no client can work with; its password is not repeated."""
    where = f"environment variable {variable}"
    try:
        url = urlsplit(value if "://" in value else f"http://{value}")
        usable = bool(url.hostname) and (url.port is None or url.port > 0)
    except ValueError:
        usable = False
    if not usable or url.scheme not in ("http", "https", *_SOCKS):
        raise InputError(
            "the proxy that the environment names cannot be used",
            where=where,
            expected="http://HOST:PORT, https://HOST:PORT or socks5://HOST:PORT",
            found=_without_password(value),
            do="correct the variable, or unset it",
        )
    if url.scheme in _SOCKS and importlib.util.find_spec("socksio") is None:
        raise InputError(
            "a SOCKS proxy needs a package that is not installed",
            where=where,
            found=_without_password(value),
            do="pip install socksio; or name an HTTP proxy, or unset the variable",
        )


def through_proxy(url: str) -> str:
    """Say by which variable requests to a URL go through a proxy; empty if they go past them."""
    parts = urlsplit(url)
    proxies = getproxies_environment()
    kind = next((each for each in (parts.scheme, "all") if each in proxies), None)
    host = parts.hostname or ""
    if kind is None or is_loopback(host) or proxy_bypass(host):
        return ""
    variable, value = _variable(kind)
    return f" (through {variable}: {_without_password(value)})"


def _variable(kind: str) -> tuple[str, str]:
    """Name and value of the variable that names the proxy for `http`, `https` or `all`."""
    value = getproxies_environment()[kind]
    names = [n for n in os.environ if n.lower() == f"{kind}_proxy" and os.environ[n] == value]
    return next(iter(names), f"{kind.upper()}_PROXY"), value


def _without_password(proxy: str) -> str:
    scheme, mark, rest = proxy.rpartition("://")
    return f"{scheme}{mark}{rest.rpartition('@')[2]}"
