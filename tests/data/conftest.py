"""Small data sets on disk, made once."""

import pytest
from samples import write_folder, write_tars


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("folder"))


@pytest.fixture(scope="session")
def tars(tmp_path_factory):
    return write_tars(tmp_path_factory.mktemp("tars"))


@pytest.fixture(scope="session")
def openmoji_dir(tmp_path_factory):
    """The real OpenMoji data set, prepared."""
    from mmjax.data.tfds_source import prepare

    directory = tmp_path_factory.mktemp("tfds")
    prepare("openmoji", str(directory))
    return str(directory)
