"""The same random weights in each run; the largest differences seen are printed in the end."""

import importlib.util

import parity
import pytest


@pytest.hookimpl(tryfirst=True)  # before the fixtures, which make models of transformers
def pytest_runtest_setup():
    if importlib.util.find_spec("torch"):
        import torch

        torch.manual_seed(0)


def pytest_sessionfinish(session):
    # To those who print them: in a run of several processes, another one.
    found = vars(session.config).setdefault("workeroutput", {}).setdefault("differences", [])
    found += [[*key, value] for key, value in parity.LARGEST.items()]
