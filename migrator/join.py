"""How a machine becomes a node of a fleet: an invitation, a certificate, the store's secret.

An invitation is `https://HOST:PORT/#CERTIFICATE.TOKEN`: who has it knows the authority (its
certificate is in there) and may join until it expires. People hand it over.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import http.client
import json
import os
import secrets
import ssl
import time
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from ..agent.authority import (
    NO_CHECK_TIME,
    fleet_folder,
    node_subject,
    place_certificate,
    request_certificate,
    sign,
)
from ..agent.errors import revive
from ..agent.fields import Field, parse
from ..agent.identity import check_node_name
from ..agent.peers import split_address
from ..checkpoint import proc
from ..checkpoint.errors import AccessDenied, LzyError
from ..checkpoint.store import Store
from .fleet import Fleet, Member

_VALID_S = 3600.0
_BODY: Final = {
    "token": Field("string", "of the invitation", 1, 200, required=True),
    "name": Field("string", "of the node", 1, 32, required=True),
    "address": Field("string", "HOST:PORT of its agent", 3, 200, required=True),
    "request": Field("string", "for a certificate, in PEM", 1, 8000, required=True),
}


def invite(folder: Path, address: str) -> str:
    """Make an invitation for an hour, or until a reboot; those before it hold no longer."""
    place = fleet_folder(folder)
    token = secrets.token_urlsafe(24)
    path = place / "invitation.json"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(descriptor, "w") as file:
        until_s = time.clock_gettime(time.CLOCK_BOOTTIME) + _VALID_S  # whatever the clock is set to
        json.dump({"token": token, "boot_id": proc.boot_id(), "until_boot_s": until_s}, file)
    der = ssl.PEM_cert_to_DER_cert((place / "ca.pem").read_text())
    return f"https://{address}/#{base64.urlsafe_b64encode(der).decode().rstrip('=')}.{token}"


def admit(fleet: Fleet, body: bytes) -> dict[str, Any]:
    """Let a machine in: its certificate, the authority's, the store's secret."""
    asked = parse(body, _BODY)
    place = fleet_folder(fleet.folder)
    try:
        known = json.loads((place / "invitation.json").read_bytes())
    except (OSError, ValueError):
        known = {"token": "", "boot_id": "", "until_boot_s": 0}
    right = hmac.compare_digest(known["token"].encode(), asked["token"].encode())
    holds = known["boot_id"] == proc.boot_id()
    holds = holds and time.clock_gettime(time.CLOCK_BOOTTIME) < known["until_boot_s"]
    if not right or not known["token"] or not holds:
        raise AccessDenied("that invitation does not hold", remedy="make one: lzy nodes --invite")
    name = check_node_name(asked["name"])
    split_address(asked["address"])
    for member in fleet.members:
        if member.name == name and member.address != asked["address"]:
            raise LzyError(f"there is a node {name} already", remedy="choose another --name")
    certificate = sign(place, asked["request"], node_subject(name))
    with Store.open(fleet.folder / "store", create=True) as store:
        secret = (store.path / "secret").read_bytes()
    fleet.add(Member(name, asked["address"]))
    authority = (place / "ca.pem").read_text()
    return {"certificate": certificate, "authority": authority, "secret": secret.hex()}


def join(folder: Path, invitation: str, name: str, address: str) -> None:
    """Become a node of the fleet that the invitation is for."""
    parts = urlsplit(invitation)
    authority, dot, token = parts.fragment.partition(".")
    try:
        der = base64.urlsafe_b64decode(authority + "=" * (-len(authority) % 4))
        if parts.scheme != "https" or not dot or not parts.netloc or not der:
            raise ValueError
    except (ValueError, binascii.Error):
        words = "that is no invitation"
        raise LzyError(words, remedy="lzy nodes --invite prints one") from None
    host, port = split_address(parts.netloc)
    place = fleet_folder(folder)
    request = request_certificate(place, node_subject(name))
    body = {"token": token, "name": name, "address": address, "request": request}
    answer = _ask(host, port, ssl.DER_cert_to_PEM_cert(der), body)
    (folder / "store").mkdir(mode=0o700, parents=True, exist_ok=True)
    secret = folder / "store" / "secret"
    if secret.exists() and secret.read_bytes().hex() != answer["secret"]:
        raise LzyError(
            f"{folder / 'store'} has images with another secret",
            remedy="give the node another LZY_HOME",
        )
    secret.touch(mode=0o600)
    secret.write_bytes(bytes.fromhex(answer["secret"]))
    place_certificate(place, answer["certificate"], answer["authority"])


def _ask(host: str, port: int, authority: str, body: dict[str, Any]) -> dict[str, Any]:
    """Ask the migrator, if it shows a certificate of that authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    connection = http.client.HTTPSConnection(host, port, timeout=30, context=context)
    try:
        context.load_verify_locations(cadata=authority)
        context.verify_flags |= NO_CHECK_TIME
        connection.request("POST", "/v1/join", json.dumps(body))
        answer = connection.getresponse()
        document: dict[str, Any] = json.loads(answer.read())
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise LzyError(
            f"the migrator at {host}:{port} did not answer: {error}",
            remedy="is lzy up there, and can that address be reached from here?",
        ) from error
    finally:
        connection.close()
    if answer.status >= 300:
        raise revive(document)
    return document
