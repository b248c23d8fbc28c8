"""`make soak`: that it asks enough of every property test, and claims nothing of a test that did not run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.soak import TESTS_ARE_LEFT

ROOT = Path(__file__).resolve().parents[2]
PROPERTY = "from hypothesis import given, settings, strategies as st\n\n"

pytestmark = pytest.mark.process


def soak(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HYPOTHESIS_PROFILE": "soak"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.support.soak",
        "-p",
        "no:cacheprovider",
        "-m",
        "hypothesis or soak or sampled",
    ]
    return subprocess.run(  # noqa: S603 - our own tests
        [*command, "-n", "0", *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_every_property_test_draws_thousands_of_examples() -> None:
    ended = soak("--minutes", "1", "--collect-only", "-q")
    assert ended.returncode == pytest.ExitCode.OK, ended.stdout + ended.stderr
    assert "test_machine.py::test_whatever_happens" in ended.stdout


def test_a_property_test_that_sets_its_number_of_examples_by_itself_is_refused(tmp_path: Path) -> None:
    few = tmp_path / "test_few.py"
    few.write_text(f"{PROPERTY}@settings(max_examples=5)\n@given(st.none())\ndef test_few(nothing): pass\n")
    ended = soak("--minutes", "1", str(few))
    assert ended.returncode == pytest.ExitCode.USAGE_ERROR
    assert "test_few sets max_examples itself" in ended.stdout + ended.stderr


def test_a_soak_whose_time_is_up_names_the_tests_that_are_left_and_does_not_pass() -> None:
    ended = soak("--minutes", "0", "tests/unit/test_outcome.py", "--hypothesis-seed", "7")
    assert ended.returncode == TESTS_ARE_LEFT, ended.stdout + ended.stderr
    assert "seed 7: 0 tests ran" in ended.stdout
    assert "tests/unit/test_outcome.py::test_" in ended.stdout
