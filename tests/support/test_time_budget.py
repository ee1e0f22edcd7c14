"""A run that may not last longer leaves tests out and says so; the main job comes first, samples last."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import time_budget

pytest_plugins = ["pytester"]

CONFTEST = """
import pytest
from tests.support import time_budget

def pytest_addoption(parser):
    parser.addoption("--minutes", type=float)

def pytest_configure(config):
    config.addinivalue_line("markers", "sampled(kind): some")
    time_budget.register(config)
"""
TESTS = """
import pytest

@pytest.mark.sampled("story")
def test_sample(): print("ran sample")

def test_other(): print("ran other")

@pytest.mark.timeout(1500)
def test_story(): print("ran story")
"""
MAIN = "def test_job(): print('ran main')"


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A suite of four tests."""
    monkeypatch.syspath_prepend(str(Path(time_budget.__file__).parents[2]))
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(test_a=TESTS, test_main_job=MAIN)
    return pytester


def run(suite: pytest.Pytester, *options: str) -> pytest.RunResult:
    return suite.runpytest_inprocess("-s", "-p", "no:randomly", "-p", "no:xdist", *options)


def test_in_time_all_run_in_their_order(suite: pytest.Pytester) -> None:
    result = run(suite, "--minutes", "10")
    result.assert_outcomes(passed=4)
    result.stdout.fnmatch_lines(["*ran main*", "*ran story*", "*ran other*", "*ran sample*"])
    result.stdout.no_fnmatch_line("*left out*")


def test_what_has_not_begun_in_time_is_left_out(suite: pytest.Pytester) -> None:
    result = run(suite, "--minutes", "-1")
    result.assert_outcomes(skipped=4)
    result.stdout.fnmatch_lines(["4 tests were left out*"])


def test_a_long_one_does_not_begin_at_the_end(suite: pytest.Pytester) -> None:
    run(suite, "--minutes", "2").assert_outcomes(passed=3, skipped=1)


def test_without_the_option_nothing_is_left_out(suite: pytest.Pytester) -> None:
    run(suite).assert_outcomes(passed=4)
