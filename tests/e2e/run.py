#!/usr/bin/env python3
"""Runs the end-to-end tests against a built gptd.

    python3 tests/e2e/run.py [--server build/gptd] [--model models/demo] [--backend cpu|cuda] [--quick] [name ...]

A name picks modules, classes or tests by a part of it. --quick is for sanitizer builds: the same paths, less load.
Tests of what a GPU does not have are skipped there, with the reason.
The last line is "N passed, N failed" (", N skipped" where some were); the exit status is 0 if none failed.
"""

import argparse
import os
import sys
import time
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
import harness  # noqa: E402


class Result(unittest.TextTestResult):
    """Counts each test once, subtests or not, and keeps the slowest."""

    def __init__(self, *args, **kw):
        super().__init__(*args, **kw)
        self.times = []

    def startTest(self, test):
        self._began = time.monotonic()
        super().startTest(test)

    def stopTest(self, test):
        self.times.append((time.monotonic() - self._began, test.id()))
        super().stopTest(test)

    def failed_tests(self):
        failed = self.failures + self.errors + [(test, "") for test in self.unexpectedSuccesses]
        return {getattr(test, "test_case", test).id() for test, _ in failed}


def tests_of(suite):
    for item in suite:
        if isinstance(item, unittest.TestSuite):
            yield from tests_of(item)
        else:
            yield item


def pick(suite, names):
    chosen = [t for t in tests_of(suite) if not names or any(n in t.id() for n in names)]
    return unittest.TestSuite(chosen)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--server", default=harness.SERVER)
    parser.add_argument("--model", default=harness.MODEL)
    parser.add_argument("--backend", choices=("cpu", "cuda"), default=harness.BACKEND)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--verbose", "-v", action="store_true")
    parser.add_argument("names", nargs="*")
    arguments = parser.parse_args()
    harness.SERVER = os.path.abspath(arguments.server)
    harness.MODEL = os.path.abspath(arguments.model)
    harness.BACKEND = arguments.backend
    harness.QUICK = arguments.quick
    if not os.access(harness.SERVER, os.X_OK):
        sys.exit(f"{arguments.server}: not built (make)")

    suite = pick(unittest.defaultTestLoader.discover(HERE, pattern="test_*.py"), arguments.names)
    began = time.monotonic()
    runner = unittest.TextTestRunner(verbosity=2 if arguments.verbose else 1, resultclass=Result)
    result = runner.run(suite)

    for test, reason in result.skipped:
        print(f"skipped {test.id()}: {reason}")
    for seconds, name in sorted(result.times, reverse=True)[:5]:
        print(f"{seconds:6.1f} s  {name}")
    failed, skipped = len(result.failed_tests()), len(result.skipped)
    passed = max(result.testsRun - failed - skipped, 0)
    print(f"end to end: {time.monotonic() - began:.0f} s")
    print(f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""))
    return 1 if failed or not result.testsRun else 0


if __name__ == "__main__":
    sys.exit(main())
