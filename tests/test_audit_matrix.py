"""Real TRL logs: every planted fault is found without options, and honest logs are not accused.

The logs were recorded; with PAIRTUNE_ALARMS=fresh (`make alarms`) they are made again by the TRL that is installed.
"""

from __future__ import annotations

import os

import pytest
from audit_matrix import EXPECTED, NO_EVIDENCE, PAGE, Log, page, unpack

FRESH = os.environ.get("PAIRTUNE_ALARMS") == "fresh"
MOST_WRONG = 0.05


@pytest.fixture(scope="module")
def logs(tmp_path_factory) -> list[Log]:
    folder = tmp_path_factory.mktemp("logs")
    if not FRESH:
        return unpack(folder)
    import trl_runs

    trl_runs.main(folder)
    trl_runs.record(folder, folder / "logs.json.xz")
    return unpack(folder / "again", folder / "logs.json.xz")


@pytest.mark.parametrize("fault", EXPECTED)
def test_a_fault_is_found_wherever_the_log_holds_the_evidence(logs, fault):
    planted = [log for log in logs if log.fault == fault]
    assert len(planted) >= 2, "at every step and at every tenth"
    missed = {log.name for log in planted if not log.found()}
    assert missed == NO_EVIDENCE & {log.name for log in planted}


def test_there_are_enough_of_both_kinds(logs):
    assert sum(not log.fault for log in logs) >= 60
    assert len({log.name.rsplit("-every-", 1)[0] for log in logs if log.fault}) >= 40


def test_honest_logs_are_not_accused(logs):
    wrong = {log.name: log.wrong() for log in logs if not log.fault}
    assert not {name for name, findings in wrong.items() if any(each.level == "error" for each in findings)}
    assert sum(map(bool, wrong.values())) <= MOST_WRONG * len(wrong), wrong


@pytest.mark.skipif(FRESH, reason="the page shows the recorded logs")
def test_the_page_is_up_to_date(logs):
    assert page(logs) == PAGE.read_text(), "`make docs` writes it"
