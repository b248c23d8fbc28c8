"""Fill an empty database with made-up people."""

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from crm.errors import OperatorError
from crm.legacy_schema import GENERATIONS
from crm.sample_data.loader import load


class Command(BaseCommand):
    """Arguments, one call, print."""

    help = (
        "Make the application's tables where they are missing, and fill them with made-up people as they really are. "
        "A database whose tables hold rows is never touched."
    )
    # Tables of an application that has never been migrated are what this makes.
    requires_migrations_checks = False

    def add_arguments(self, parser: CommandParser) -> None:
        """Add how many people, of which generation, from which seed."""
        parser.add_argument(
            "--people",
            type=int,
            default=10_000,
            metavar="N",
            help="how many human beings (default: %(default)s). Four in ten have a user and a profile, the others are "
            "known by their leads alone: about 0.4 profiles and 0.9 leads a person, and 3 contacts that the CRM has "
            "already for every 100",
        )
        parser.add_argument(
            "--generation",
            choices=GENERATIONS,
            default=GENERATIONS[0],
            help="whose tables (default: %(default)s)",
        )
        parser.add_argument(
            "--seed",
            type=int,
            default=1,
            metavar="NUMBER",
            help="the same people, generation and seed give the same rows (default: %(default)s)",
        )

    def handle(self, *_args: Any, people: int, generation: str, seed: int, **_options: Any) -> None:
        """Load the sample data."""
        try:
            loaded = load(people, generation, seed)
        except OperatorError as error:
            raise CommandError(str(error), returncode=error.exit_code) from error
        for table, rows in loaded.rows.items():
            self.stdout.write(f"{table:<20}{rows:>12,}")
        self.stdout.write(
            f"{people:,} people of generation {generation} loaded: {loaded.total:,} rows in {loaded.seconds:.1f} s."
        )
