"""A CLIP of Hugging Face format with random weights, made once, and a folder of pictures."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from search_pictures import picture

from experiments._random_clip import write_random_clip
from mmjax.search import Embedder


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory):
    """Each command compiles the same functions anew: let it find them."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    compilation_cache.reset_cache()
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    return write_random_clip(
        tmp_path_factory.mktemp("clip") / "weights", width=32, depth=1, max_len=16
    )


@pytest.fixture(scope="session")
def embedder(weights):
    return Embedder.load(weights, batch_size=8)


@pytest.fixture
def images(tmp_path):
    """21 pictures, three of them in a folder of their own, and what is none."""
    folder = tmp_path / "images"
    (folder / "more" / "deep").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for i in range(18):
        picture(i).save(folder / f"{i:02d}.png")
    for i in range(18, 21):
        picture(i).save(folder / "more" / "deep" / f"{i}.JPG", "JPEG")
    picture(50).save(folder / ".hidden" / "x.png")
    picture(51).save(folder / "._18.png")
    (folder / "notes.txt").write_text("no image")
    return folder
