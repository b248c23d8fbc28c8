"""`make soak`: every property test with thousands of examples, the stateful machine, and the tests marked `soak`.

A pytest plugin. It prints the seed, another one each time, and how long the tests took. When the time is up, tests that
have begun go on to their end, and no other begins. A soak that did not get through all tests does not pass: it names
those that are left.
"""

from __future__ import annotations

import secrets
import time

import pytest

from tests.support.profiles import MIN_EXAMPLES, settings_of

#: The exit code when tests are left and none has failed; pytest's own end with 5.
TESTS_ARE_LEFT = 6

_UNTIL = pytest.StashKey[float]()
_STARTED = pytest.StashKey[float]()
_TIME_IS_UP = "the time is up"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    parser.addoption("--minutes", type=float, required=True, help="no test begins when these are over")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Choose the seed, before Hypothesis asks for it. Processes that share the tests take the seed of the first."""
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = str(secrets.randbelow(2**32))
    config.stash[_STARTED] = time.monotonic()
    config.stash[_UNTIL] = time.monotonic() + 60 * config.option.minutes


def pytest_report_header(config: pytest.Config) -> str:
    """Name the seed: `make soak ARGS=--hypothesis-seed=...` draws the same examples again."""
    return f"soak: seed {config.option.hypothesis_seed}, no test begins after {config.option.minutes:g} minutes"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse a property test that asks for fewer examples by itself."""
    for item in items:
        chosen = settings_of(item)
        if chosen is not None and chosen.max_examples < MIN_EXAMPLES:
            raise pytest.UsageError(f"{item.nodeid} sets max_examples itself: take tests.support.profiles.examples")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Let no test begin when the time is up."""
    if time.monotonic() >= item.config.stash[_UNTIL]:
        pytest.skip(_TIME_IS_UP)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what ran: seed, time, and which tests are left."""
    minutes = (time.monotonic() - config.stash[_STARTED]) / 60
    left = _left(terminalreporter)
    ran = sum(len(terminalreporter.getreports(outcome)) for outcome in ("passed", "failed"))
    terminalreporter.section("soak")
    terminalreporter.line(f"seed {config.option.hypothesis_seed}: {ran} tests ran in {minutes:.1f} minutes")
    if left:
        terminalreporter.line(f"The time was up before {len(left)} others: this soak proves nothing of them.")
        for name in left:
            terminalreporter.line(f"  {name}")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Let a soak fail that did not get through all tests."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and exitstatus == pytest.ExitCode.OK and _left(reporter):
        session.exitstatus = TESTS_ARE_LEFT


def _left(reporter: pytest.TerminalReporter) -> list[str]:
    return [report.nodeid for report in reporter.getreports("skipped") if _TIME_IS_UP in str(report.longrepr)]
