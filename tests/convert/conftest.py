"""Prints the largest differences from transformers that the tests have seen."""

import parity


def pytest_terminal_summary(terminalreporter):
    if parity.LARGEST:
        terminalreporter.section("largest differences from transformers")
        for (family, what), difference in sorted(parity.LARGEST.items()):
            terminalreporter.write_line(f"{family:28} {what:36} {difference:.1e}")
