"""One finished run and one cache of compiled programs for all tests of the commands."""

import pytest
import runs

STEPS = 60


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="session")
def finished(tmp_path_factory, cache):
    """The work directory of a run that nothing interrupted; not to be changed."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    runs.train("", workdir, cache=cache)
    return workdir
