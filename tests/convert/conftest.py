"""The same random weights in each run, and in the end the largest differences that were seen."""

import importlib.util

import parity
import pytest


@pytest.hookimpl(tryfirst=True)  # before the fixtures, which make models of transformers
def pytest_runtest_setup():
    if importlib.util.find_spec("torch"):
        import torch

        torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter):
    if parity.LARGEST:
        terminalreporter.section("largest differences from transformers")
        for (family, what), difference in sorted(parity.LARGEST.items()):
            terminalreporter.write_line(f"{family:28} {what:36} {difference:.1e}")
