"""`python manage.py load_sample_data`: fill an empty database with sample data."""

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from crm.errors import OperatorError
from crm.legacy_schema import GENERATIONS
from crm.sample_data.loader import load


class Command(BaseCommand):
    """Arguments, one call, print."""

    help = (
        "Create the application's tables if they are missing, and fill them with realistic sample data. "
        "A database whose tables contain rows is refused."
    )
    # The database may never have been migrated: this command creates the application's tables.
    requires_migrations_checks = False

    def add_arguments(self, parser: CommandParser) -> None:
        """Add the options."""
        parser.add_argument(
            "--people",
            type=int,
            default=10_000,
            metavar="N",
            help="number of people (default: %(default)s). Four in ten have a user and a profile, the others only "
            "leads: per 100 people about 40 profiles, 90 leads and 3 contacts that are already in the CRM",
        )
        parser.add_argument(
            "--generation",
            choices=GENERATIONS,
            default=GENERATIONS[0],
            help="generation (version) of the application's tables (default: %(default)s)",
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
