"""``jwins keys``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jwins.cli.app import EPILOG, app, console_of, reported_errors, say

if TYPE_CHECKING:
    from jwins.net.certificate import Certificate

keys = typer.Typer(
    help="Make and show the keys and certificates of nodes.", no_args_is_help=True, epilog=EPILOG
)
app.add_typer(keys, name="keys")

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the node.")]
Folder = Annotated[Path, typer.Option("--folder", metavar="DIR", help="Folder of NAME.key and NAME.crt.")]
Days = Annotated[int, typer.Option("--days", help="Days for which the certificate is valid.")]


@keys.command(epilog=EPILOG)
def new(name: Name, folder: Folder = Path(), days: Days = 365) -> None:
    """Make a private key and a certificate; never overwrite a file."""
    with reported_errors():
        from jwins.net.certificate import new_identity

        key, file, certificate = new_identity(name, folder, days)
        console = console_of()
        say(console, f"key:         {key} (mode 0600; keep it on this machine)")
        _print_identity(file, certificate)


@keys.command(epilog=EPILOG)
def renew(name: Name, folder: Folder = Path(), days: Days = 365) -> None:
    """Make a new certificate for an existing key, and replace the old one."""
    with reported_errors():
        from jwins.net.certificate import renewed
        from jwins.run_folder.atomic import write_atomically

        certificate = renewed(name, folder / f"{name}.key", days)
        file = folder / f"{name}.crt"
        write_atomically(file, certificate.pem.encode())
        _print_identity(file, certificate)


@keys.command(epilog=EPILOG)
def show(
    certificate: Annotated[
        Path, typer.Argument(metavar="CERTIFICATE", help="File of a certificate, such as alice.crt.")
    ],
) -> None:
    """Show the fingerprint of a certificate; compare it with its owner by telephone."""
    with reported_errors():
        from jwins.net.certificate import certificate_in

        _print_identity(certificate, certificate_in(certificate))


def _print_identity(file: Path, certificate: Certificate) -> None:
    console = console_of()
    for line in (
        f"certificate: {file} (send it to the keeper of the roster)",
        f"name:        {certificate.name}",
        f"fingerprint: {certificate.fingerprint}",
        f"expires:     {certificate.not_after:%Y-%m-%d %H:%M} UTC",
    ):
        say(console, line)
