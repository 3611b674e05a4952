"""A pytest plugin: how long each folder of tests took, against the budget that it has.

Over budget is said in the table; more than twice the budget fails the run, as no busy neighbour explains that.

Time is the sum over tests of set-up, call and tear-down. A folder is judged only when the whole of it ran: a selection
by path, name, mark or an early stop prints its seconds and no verdict. `--full` runs large counts and has no budgets.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

import pytest

BUDGETS = {"unit": 10, "contract": 300, "numeric": 240, "server": 150, "e2e": 480, "kernels": 180, "gpu": 180}
_PARTIAL = ("keyword", "markexpr", "deselect", "ignore", "ignore_glob", "lf", "stepwise", "collectonly")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Budget(config), "slipstream-budget")


class Budget:
    """Collects durations by first folder below tests/."""

    def __init__(self, config: pytest.Config) -> None:
        self._tests = config.rootpath / "tests"
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._counts: Counter[str] = Counter()
        self._judged = not config.getoption("full") and not any(config.getoption(name, None) for name in _PARTIAL)
        self._roots = [(config.invocation_params.dir / argument).resolve() for argument in config.args]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        parts = Path(report.nodeid.partition("::")[0]).parts
        if len(parts) > 2 and parts[0] == "tests":
            self._seconds[parts[1]] += report.duration
            self._counts[parts[1]] += report.when == "call"

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if session.shouldstop or session.shouldfail:
            self._judged = False
        if exitstatus == pytest.ExitCode.OK and any(self._over(folder, times=2) for folder in self._seconds):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self._seconds:
            return
        terminalreporter.section("seconds by folder")
        terminalreporter.write_line(f"{'folder':<10} {'tests':>6} {'seconds':>8} {'budget':>7}")
        for folder in sorted(self._seconds):
            budget = str(BUDGETS.get(folder, "none")) if self._whole(folder) else "-"
            row = f"{folder:<10} {self._counts[folder]:>6} {self._seconds[folder]:>8.1f} {budget:>7}"
            over = self._over(folder)
            terminalreporter.write_line(row + ("  OVER BUDGET" if over else ""), red=over)

    def _whole(self, folder: str) -> bool:
        path = self._tests / folder
        return self._judged and any(root == path or root in path.parents for root in self._roots)

    def _over(self, folder: str, times: int = 1) -> bool:
        """A folder without a budget counts as over it: whoever adds one decides what it may cost."""
        return self._whole(folder) and self._seconds[folder] > BUDGETS.get(folder, 0) * times
