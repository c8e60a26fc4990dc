"""Who belongs to a fleet: a small certificate authority, and TLS with proof from both sides.

    fleet/ca.pem, ca.key     the authority; its key is only where the migrator is
    fleet/own.pem, own.key   this daemon's certificate: "node NAME" or "migrator"
    fleet/nodes.json         at the migrator: which nodes there are (`lzy.migrator.fleet`)

Keys are made where they are used and never travel. Certificates are made by the `openssl` command
(docs/decisions.md says why); TLS is Python's own.
"""

from __future__ import annotations

import os
import ssl
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from ..checkpoint.errors import LzyError, NotFound, Unsupported

MIGRATOR = "migrator"
NO_CHECK_TIME = 0x200000
"""X509_V_FLAG_NO_CHECK_TIME, X509_VERIFY_PARAM_set_flags(3). Certificates hold for ten years from
when they were made; a node whose clock is behind, or is set back, must not be cut off by that."""
_DAYS = "3650"
_CURVE = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


def fleet_folder(folder: Path) -> Path:
    """Where a home keeps what makes it part of a fleet."""
    return folder / "fleet"


def agent_place(folder: Path) -> Path:
    """Where the certificate of a home's agent is: apart from that of a migrator beside it."""
    beside = folder / "node"
    return beside if beside.exists() else fleet_folder(folder)


def node_subject(name: str) -> str:
    """What the certificate of a node's agent says."""
    return f"node {name}"


def make_authority(place: Path) -> None:
    """Make `ca.pem` and `ca.key` in that folder unless they are there."""
    if (place / "ca.pem").exists():
        return
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = place / "ca.new"
    _openssl(
        "req", "-x509", *_CURVE, "-days", _DAYS, "-subj", "/CN=lzy fleet",
        "-keyout", str(place / "ca.key"), "-out", str(draft),
    )  # fmt: skip
    draft.rename(place / "ca.pem")  # last: what is half made is made again


def request_certificate(place: Path, subject: str) -> str:
    """Make `own.key` in that folder, and a request (PEM) for a certificate that says `subject`."""
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    request = place / "own.csr"
    _openssl("req", "-new", *_CURVE, "-subj", f"/CN={subject}",
             "-keyout", str(place / "own.key"), "-out", str(request))  # fmt: skip
    text = request.read_text()
    request.unlink()
    return text


def sign(authority: Path, request: str, subject: str) -> str:
    """A certificate (PEM) for the key of `request`, whatever that says, that says `subject`."""
    with tempfile.TemporaryDirectory() as work:
        paths = [os.path.join(work, name) for name in ("request", "certificate", "extensions")]
        Path(paths[0]).write_text(request)
        Path(paths[2]).write_text("basicConstraints=critical,CA:FALSE\n")
        _openssl(
            "x509", "-req", "-in", paths[0], "-days", _DAYS, "-subj", f"/CN={subject}",
            "-CA", str(authority / "ca.pem"), "-CAkey", str(authority / "ca.key"),
            "-set_serial", str(int.from_bytes(os.urandom(8))),
            "-extfile", paths[2], "-out", paths[1],
        )  # fmt: skip
        return Path(paths[1]).read_text()


def place_certificate(place: Path, certificate: str, authority: str) -> None:
    """Keep the certificate for `own.key`, and that of the authority it is from."""
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    (place / "own.pem").write_text(certificate)
    (place / "ca.pem").write_text(authority)


def issue(authority: Path, place: Path, subject: str) -> None:
    """Request, sign and place, where the authority is at hand; nothing if there is one already."""
    if (place / "own.pem").exists():
        return
    request = request_certificate(place, subject)
    place_certificate(place, sign(authority, request, subject), (authority / "ca.pem").read_text())


def is_member(folder: Path) -> bool:
    """Whether the agent of a home has a certificate."""
    return (agent_place(folder) / "own.pem").exists()


def server_context(place: Path, *, guests: bool = False) -> ssl.SSLContext:
    """TLS for those who are asked; who asks must show a certificate, unless `guests` may too."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _load(context, place)
    context.verify_mode = ssl.CERT_OPTIONAL if guests else ssl.CERT_REQUIRED
    return context


def client_context(place: Path) -> ssl.SSLContext:
    """TLS for those who ask. Who answers is checked by what its certificate says (`subject_of`)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # by name of the node, not by its address
    _load(context, place)
    return context


def _load(context: ssl.SSLContext, place: Path) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_flags |= NO_CHECK_TIME
    try:
        context.load_verify_locations(place / "ca.pem")
        context.load_cert_chain(place / "own.pem", place / "own.key")
    except FileNotFoundError as error:
        raise NotFound(f"{place} holds no certificate", remedy="join the fleet again") from error
    except ssl.SSLError as error:
        raise LzyError(f"the certificates in {place} cannot be used: {error}") from error


def subject_of(certificate: Any) -> str:
    """What a peer's certificate (as `getpeercert` answers) says; empty when there is none."""
    for part in (certificate or {}).get("subject", ()):
        for name, value in part:
            if name == "commonName":
                return str(value)
    return ""


def _openssl(*words: str) -> None:
    try:
        done = subprocess.run(
            ["openssl", *words], capture_output=True, text=True, timeout=60, umask=0o077
        )
    except FileNotFoundError as error:
        raise Unsupported(
            "certificates are made by the openssl command, which is not here",
            remedy="install openssl (the package of that name)",
        ) from error
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise LzyError(f"openssl {words[0]} failed: {said}")
