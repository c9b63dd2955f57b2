"""One finished run and one cache of compiled programs for all tests of the commands."""

import launch
import pytest

STEPS = 60


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="session")
def finished(tmp_path_factory, cache):
    """The work directory of a run that nothing interrupted; not to be changed."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    launch.train("", workdir, cache=cache)
    return workdir
