"""Files of installed packages have names that are the same on every machine."""

from pathlib import Path

import pytest

from mmjax.paths import located


def test_a_file_of_a_package_that_is_not_imported():
    import numpy

    found = located("package:numpy/version.py")
    assert found == Path(numpy.__file__).parent / "version.py"


def test_other_paths_stay():
    assert located("runs/a") == Path("runs/a")
    assert located("~/a") == Path.home() / "a"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("package:no_such_thing/a.gguf", "pip install no-such-thing"),
        ("package:numpy/none.gguf", "has no 'none.gguf'"),
    ],
)
def test_what_is_not_there(path, message):
    with pytest.raises(FileNotFoundError, match=message):
        located(path)
