"""``jwins roster``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jwins.cli.app import EPILOG, USAGE, app, console_of, leave, reported_errors, say

roster = typer.Typer(
    help="Edit and check the roster, the list of the members.", no_args_is_help=True, epilog=EPILOG
)
app.add_typer(roster, name="roster")

File = Annotated[Path, typer.Argument(metavar="ROSTER", help="File of the roster, such as roster.toml.")]
FromRound = Annotated[
    int | None,
    typer.Option(
        "--from-round",
        metavar="N",
        help="Round from which the change is in effect, if nodes run already; raises the roster version.",
    ),
]


@roster.command(epilog=EPILOG)
def add(
    file: File,
    certificate: Annotated[
        Path, typer.Argument(metavar="CERTIFICATE", help="File of the certificate, such as alice.crt.")
    ],
    address: Annotated[str, typer.Option(metavar="HOST:PORT", help="Address at which the others dial it.")],
    id_: Annotated[
        int | None, typer.Option("--id", metavar="N", help="Id that no member ever had. Default: the next.")
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Name of the member. Default: that of the certificate."),
    ] = None,
    unreachable: Annotated[
        bool,
        typer.Option("--unreachable", help="The member is behind a firewall or NAT and only dials others."),
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Change the entry of a member, such as its certificate.")
    ] = False,
    from_round: FromRound = None,
) -> None:
    """Add a member, or change its entry; create the file if it does not exist."""
    with reported_errors():
        from jwins.errors import ConfigError
        from jwins.net.certificate import certificate_in
        from jwins.net.roster import Member, Roster, read_roster, write_roster

        found = read_roster(file) if file.exists() else Roster()
        seen = certificate_in(certificate)
        name = name or seen.name
        old = next((member for member in found.members if member.name == name), None)
        if id_ is None:
            id_ = old.id if old is not None else max(found.ids_ever, default=-1) + 1
        if from_round is not None and old is None and len(found.ids_ever) >= found.num_places:
            problem = "a run has no place for another member; set places at the head of its first roster"
            raise ConfigError("places", found.num_places, f"{problem} to the final number of members")
        member = Member(
            id=id_,
            name=name,
            address=address,
            reachable=not unreachable,
            fingerprint=seen.fingerprint,
            certificate=seen.pem,
        )
        changed = found.with_member(member, replace=replace, from_round=from_round)
        write_roster(changed, file)
        console = console_of()
        say(console, f"{name} has id {id_}; fingerprint {seen.fingerprint}")
        if len(changed.members) > 1:
            hint = "give this file to every member, and compare the output of `jwins roster check`"
            say(console, hint)


@roster.command(epilog=EPILOG)
def remove(
    file: File,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the member.")],
    from_round: FromRound = None,
) -> None:
    """Remove a member."""
    with reported_errors():
        from jwins.net.roster import read_roster, write_roster

        write_roster(read_roster(file).without(name, from_round=from_round), file)


@roster.command("list", epilog=EPILOG)
def list_(file: File) -> None:
    """List the members."""
    with reported_errors():
        from jwins.net.roster import read_roster

        found = read_roster(file)
        console = console_of()
        columns = [("id", "name", "address", "expires (UTC)", "fingerprint")]
        for member in found.members:
            address = member.address if member.reachable else f"{member.address} (only dials)"
            expires = f"{member.x509.not_after:%Y-%m-%d}"
            columns.append((str(member.id), member.name, address, expires, member.x509.fingerprint))
        widths = [max(map(len, column)) for column in zip(*columns, strict=True)]
        for row in columns:
            line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            say(console, line.rstrip())


@roster.command(epilog=EPILOG)
def check(file: File) -> None:
    """Check the roster for problems; exit with 2 if there is one."""
    with reported_errors():
        from jwins.net.roster import read_roster

        found = read_roster(file)
        problems = list(found.problems())
        console = console_of()
        members = f"{len(found.members)} member{'' if len(found.members) == 1 else 's'}"
        say(
            console,
            f"{members}, version {found.roster_version} from round {found.from_round}, "
            f"topology {found.topology.kind}, seed {found.seed}",
        )
        say(console, f"digest {found.digest} (must be the same at every member)")
        for warning in found.warnings():
            say(console, f"warning: {warning}")
        if problems:
            leave("\n".join(problems), USAGE)
