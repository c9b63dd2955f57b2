"""The index: right answers, updates, interruptions, damage."""

import json
import os
import shutil

import numpy as np
import pytest
from search_pictures import picture

from mmjax.data.sources import DataNotFoundError
from mmjax.registry import UnknownNameError
from mmjax.search import BACKENDS, Index, SearchIndexError, backends, update_index
from mmjax.search.embed import Embedder


class Counting:
    """The embedder, and how many images it was given."""

    def __init__(self, embedder):
        self._embedder, self.images = embedder, 0

    def __getattr__(self, name):
        return getattr(self._embedder, name)

    def prepared_images(self, prepared):
        self.images += len(prepared)
        return self._embedder.prepared_images(prepared)


@pytest.fixture
def counting(embedder):
    return Counting(embedder)


def paths(index):
    return [entry.path for entry in index.entries]


def assert_as_if_new(directory, images, embedder):
    """An updated index has what one made at once has."""
    scratch = directory.with_name("anew")
    update_index(scratch, images, embedder)
    updated, new = Index(directory), Index(scratch)
    assert updated.entries == new.entries
    # Other neighbours in a batch may change the last bit.
    np.testing.assert_allclose(updated.embeddings, new.embeddings, atol=1e-6)
    shutil.rmtree(scratch)


def test_indexes_and_finds(images, embedder, tmp_path):
    done = update_index(tmp_path / "index", images, embedder, threads=3)
    assert done == (21, 0, 0, 0, {})
    index = Index(tmp_path / "index")
    assert len(index) == 21 and paths(index) == sorted(paths(index))
    assert index.path(20) == images / "more/deep/20.JPG"
    every = [index.path(row) for row in range(21)]
    np.testing.assert_allclose(index.embeddings, embedder.images(every), atol=1e-6)
    hits = index.search(embedder.images(every), 3)
    assert hits.rows[:, 0].tolist() == list(range(21))
    np.testing.assert_allclose(hits.scores[:, 0], 1, atol=1e-5)
    assert sorted(os.listdir(tmp_path / "index")) == [
        ".lock", "000001.files.json", "000001.npy", "index.json",
    ]  # fmt: skip


def test_updates_only_what_has_changed(images, counting, tmp_path):
    directory = tmp_path / "index"
    update_index(directory, images, counting)
    counting.images = 0
    assert update_index(directory, images, counting) == (0, 0, 0, 21, {})
    assert counting.images == 0
    picture(30).save(images / "new.png")
    picture(31).save(images / "03.png")
    os.utime(images / "04.png", (1, 1))
    (images / "05.png").unlink()
    shutil.rmtree(images / "more")
    assert update_index(directory, images, counting) == (1, 2, 4, 15, {})
    assert counting.images == 3
    assert_as_if_new(directory, images, counting)
    shutil.rmtree(images)
    images.mkdir()
    assert update_index(directory, images, counting).removed == 18
    assert len(Index(directory)) == 0
    assert update_index(directory, images, counting) == (0, 0, 0, 0, {})


def test_broken_images_are_skipped_and_named(images, embedder, tmp_path):
    directory = tmp_path / "index"
    (images / "broken.png").write_bytes(b"not an image")
    (images / "empty.jpg").touch()
    whole = (images / "07.png").read_bytes()
    done = update_index(directory, images, embedder)
    assert done.added == 21 and sorted(done.skipped) == ["broken.png", "empty.jpg"]
    assert "no known image format" in done.skipped["broken.png"]
    assert Index(directory).header.skipped == done.skipped
    # One that was sound is not found any more once it is broken, and is again when it is mended.
    (images / "07.png").write_bytes(whole[: len(whole) // 2])
    done = update_index(directory, images, embedder)
    assert (done.added, done.changed, done.removed, done.unchanged) == (0, 0, 1, 20)
    assert sorted(done.skipped) == ["07.png", "broken.png", "empty.jpg"]
    assert "07.png" not in paths(Index(directory))
    (images / "07.png").write_bytes(whole)
    picture(40).save(images / "broken.png")
    assert update_index(directory, images, embedder).added == 2
    assert_as_if_new(directory, images, embedder)


@pytest.mark.parametrize("stop", [3, 17])
def test_an_interrupted_update_goes_on(stop, images, counting, tmp_path):
    directory = tmp_path / "index"

    def interrupted(prepared, total):
        for i, item in enumerate(prepared):
            if i == stop:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        update_index(directory, images, counting, save_every=8, progress=interrupted)
    saved = stop // 8 * 8
    assert counting.images == saved
    if saved:
        assert len(Index(directory)) == saved
    # Meanwhile a file that was indexed changes, and another goes.
    picture(60).save(images / "02.png")
    (images / "01.png").unlink()
    done = update_index(directory, images, counting, save_every=8)
    again = 1 if saved else 0
    assert counting.images == 20 + 2 * again
    assert done.changed == again and done.added == 20 - saved + again
    assert_as_if_new(directory, images, counting)


def test_an_index_stays_usable_while_it_is_replaced(images, embedder, tmp_path):
    directory = tmp_path / "index"
    update_index(directory, images, embedder)
    index = Index(directory)
    before = index.search(index.embeddings[:4], 5)
    for i in range(3):
        (images / f"{i:02d}.png").unlink()
    update_index(directory, images, embedder)
    after = index.search(index.embeddings[:4], 5)
    np.testing.assert_array_equal(before.rows, after.rows)


def clustered(rows=3000, dim=24):
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(40, dim))
    vectors = centres[rng.integers(0, 40, rows)] + 0.3 * rng.normal(size=(rows, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("k", [1, 7, 3000])
@pytest.mark.parametrize("block", [64, 1000, 5000])
def test_exact_is_brute_force(k, block, monkeypatch, tmp_path):
    monkeypatch.setattr(backends, "_BLOCK", block)
    vectors = clustered()
    vectors[100:110] = vectors[5]  # ties, across blocks
    vectors[2990] = vectors[5]
    queries = vectors[[5, 17, 2999]]
    hits = BACKENDS["exact"](vectors, tmp_path / "x")(queries, k)
    scores = queries.astype(np.float64) @ vectors.T.astype(np.float64)
    order = np.argsort(-np.round(scores, 6), axis=1, kind="stable")[:, :k]
    np.testing.assert_allclose(hits.scores, np.take_along_axis(scores, order, 1), atol=2e-6)
    tied = [5, *range(100, 110), 2990]
    assert hits.rows[0, : min(k, 12)].tolist() == tied[:k]
    for row in hits.rows:
        assert len(set(row.tolist())) == k


def test_faiss_finds_the_same(tmp_path):
    pytest.importorskip("faiss")
    vectors = clustered()
    queries = vectors[::60]
    exact = BACKENDS["exact"](vectors, tmp_path / "000001")(queries, 10)
    search = BACKENDS["faiss"](vectors, tmp_path / "000001")
    hits = search(queries, 10)
    same = [len({*a} & {*b}) for a, b in zip(hits.rows.tolist(), exact.rows.tolist(), strict=True)]
    assert np.mean(same) >= 9.5
    np.testing.assert_array_equal(hits.rows[:, 0], exact.rows[:, 0])
    assert os.listdir(tmp_path) == ["000001.faiss"]
    again = BACKENDS["faiss"](np.zeros((1, 24), np.float32), tmp_path / "000001")  # from the file
    np.testing.assert_array_equal(again(queries, 10).rows, hits.rows)
    assert search(queries[:1], 3000).rows.shape == (1, 3000)


def test_a_new_segment_has_a_new_graph(images, embedder, tmp_path):
    pytest.importorskip("faiss")
    directory = tmp_path / "index"
    update_index(directory, images, embedder)
    Index(directory).search(embedder.texts(["a cat"]), 2, "faiss")
    assert (directory / "000001.faiss").exists()
    picture(70).save(images / "new.png")
    update_index(directory, images, embedder)
    assert not (directory / "000001.faiss").exists()
    index = Index(directory)
    row = paths(index).index("new.png")
    assert index.search(index.embeddings[[row]], 1, "faiss").rows.tolist() == [[row]]


def test_another_model_or_folder_is_refused(images, embedder, weights, tmp_path):
    directory = tmp_path / "index"
    update_index(directory, images, embedder)
    before = (directory / "index.json").read_text()
    other = Embedder(embedder_model(weights), embedder.processor, identity="another")
    with pytest.raises(SearchIndexError, match="was made with the model in"):
        update_index(directory, images, other)
    elsewhere = shutil.copytree(images, tmp_path / "elsewhere")
    with pytest.raises(SearchIndexError, match="is of the folder"):
        update_index(directory, elsewhere, embedder)
    assert (directory / "index.json").read_text() == before


def embedder_model(weights):
    import mmjax

    return mmjax.from_pretrained(weights)


def test_bad_folders_and_directories(images, embedder, tmp_path):
    def says(pattern, directory, folder, kind=SearchIndexError):
        with pytest.raises(kind, match=pattern):
            update_index(directory, folder, embedder)

    new = tmp_path / "index"
    says("did you mean 'images'", new, tmp_path / "imagse", DataNotFoundError)
    says("is a file", new, images / "01.png", DataNotFoundError)
    (tmp_path / "none").mkdir()
    says("holds no image: expected one of .bmp", new, tmp_path / "none", DataNotFoundError)
    (tmp_path / "none" / "a.png").write_bytes(b"x")
    says("None of the 1 images .* a.png: 1 bytes of no", new, tmp_path / "none", DataNotFoundError)
    says("not empty and no index", images, images)


def test_bad_queries_and_damage(images, embedder, tmp_path):
    directory = tmp_path / "index"
    update_index(directory, images, embedder)
    index, query = Index(directory), embedder.texts(["a cat"])
    for k in (0, 22):
        with pytest.raises(SearchIndexError, match=rf"k is {k}, but .* has 21 image"):
            index.search(query, k)
    with pytest.raises(SearchIndexError, match=r"\(1, 31\) do not fit embeddings of 32"):
        index.search(query[:, 1:], 1)
    with pytest.raises(UnknownNameError, match="did you mean 'exact'"):
        index.search(query, 1, "exakt")
    with pytest.raises(DataNotFoundError, match="did you mean 'index'"):
        Index(tmp_path / "indx")
    with pytest.raises(SearchIndexError, match="holds no index"):
        Index(images)

    def damaged(name, data, pattern):
        path = directory / name
        before = path.read_bytes()
        path.write_bytes(data)
        with pytest.raises(SearchIndexError, match=pattern):
            Index(directory)
        path.write_bytes(before)

    damaged("index.json", b"{", "damaged")
    damaged("index.json", b"{}", "damaged")
    damaged("index.json", b'{"format": 1, "dim": 3}', "damaged")
    damaged("index.json", b'{"format": 9}', "format 9; this version of mmjax reads 1")
    damaged("000001.files.json", b"[]", "0 files, 21 embeddings")
    damaged("000001.files.json", json.dumps([[1]] * 21).encode(), "damaged")
    damaged("000001.npy", b"", "damaged")
    damaged("000001.npy", (directory / "000001.npy").read_bytes()[:-9], "damaged")
    Index(directory)
