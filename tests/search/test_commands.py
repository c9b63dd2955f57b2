"""experiments.search and experiments.zero_shot: what they print, and what they refuse."""

import io
import json

import numpy as np
import pytest
from PIL import Image

import mmjax
from experiments import bench, common, search, zero_shot
from experiments.convert import write_orbax
from mmjax.search import Index


@pytest.fixture
def call(capfd):
    """Runs a command; returns (exit code, standard output, standard error)."""

    def run(main, *argv):
        with pytest.raises(SystemExit) as left:
            common.run(lambda _: main([str(arg) for arg in argv]))
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return left.value.code, out, err

    return run


@pytest.fixture
def indexed(call, images, weights, tmp_path):
    """The directory of an index that the command has made."""
    directory = tmp_path / "index"
    argv = ("index", "--weights", weights, "--images", images, "--index", directory)
    code, out, err = call(search.main, *argv, "--batch-size", 8)
    assert code == 0 and "21 images (21 new, 0 changed, 0 removed)" in out
    assert "21/21" in err  # the progress bar
    return directory


def test_index_and_query(call, indexed, images, weights, embedder, tmp_path, monkeypatch):
    code, out, _ = call(search.main, "query", "--index", indexed, "--text", "a red cat", "a dog")
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "a red cat" and lines[11] == "a dog" and len(lines) == 22
    index = Index(indexed)
    hits = index.search(embedder.texts(["a red cat"]), 10)
    for rank in range(10):
        number, score, path = lines[1 + rank].split()
        assert int(number) == rank + 1 and path == str(index.path(hits.rows[0, rank]))
        assert float(score) == pytest.approx(hits.scores[0, rank], abs=1e-4)

    argv = ("query", "--index", indexed, "--image", images / "more/deep/19.JPG", "--json")
    code, out, _ = call(search.main, *argv, "--k", 2, "--sheet", tmp_path / "found.png")
    answer = json.loads(out)
    assert answer["results"][0]["path"] == str(images / "more/deep/19.JPG")
    assert answer["results"][0]["score"] == pytest.approx(1, abs=1e-5)
    assert len(answer["results"]) == 2
    with Image.open(tmp_path / "found.png") as sheet:
        assert sheet.width > 2 * 160 and len(set(sheet.getdata())) > 100

    monkeypatch.setattr("sys.stdin", io.StringIO("a cat\n\n a dog \n"))
    code, out, _ = call(search.main, "query", "--index", indexed, "--k", 1)
    assert code == 0 and out.splitlines()[::2] == ["a cat", "a dog"]


def test_updating_needs_the_index_only(call, indexed, images):
    (images / "05.png").unlink()
    for i in range(12):
        (images / f"broken{i:02d}.png").write_bytes(b"broken")
    code, out, _ = call(search.main, "index", "--index", indexed)
    assert code == 0 and "20 images (0 new, 0 changed, 1 removed)" in out
    assert "12 skipped:" in out and "broken09.png: 6 bytes of no known" in out
    assert "broken11.png" not in out and "index.json" in out


def test_search_refuses(call, indexed, images, weights, tmp_path):
    def says(*argv):
        code, out, err = call(search.main, *argv)
        assert code == 1 and not out, out
        return err

    made = ("query", "--index", indexed)
    assert "--k is 22, but the index" in says(*made, "--text", "a", "--k", 22)
    assert "21 image(s)" in says(*made, "--text", "a", "--k", 0)
    assert "did you mean 'faiss'" in says(*made, "--text", "a", "--backend", "fais")
    assert "did you mean 'notes.txt'" in says(*made, "--image", images / "note.txt")
    assert "no known image format" in says(*made, "--image", images / "notes.txt")
    assert "tokens where the model takes 16" in says(*made, "--text", "cat dog " * 20)
    assert "holds no index" in says("query", "--index", images, "--text", "a")
    assert "does not exist" in says("query", "--index", tmp_path / "gone", "--text", "a")
    new = ("index", "--index", tmp_path / "new")
    assert "give --weights and --images" in says(*new, "--weights", weights)
    gone = ("--images", tmp_path / "gone")
    assert "The image folder" in says(*new, "--weights", weights, *gone)
    there = ("--images", images)
    assert "There is no" in says(*new, "--weights", tmp_path / "gone", *there)
    assert "config.json" in says(*new, "--weights", images, *there)
    assert "another directory" in says("index", "--index", indexed, "--images", images / "more")
    with pytest.raises(SystemExit) as left:
        search.main(["query"])
    assert left.value.code == 2


def test_another_model_is_refused(call, indexed, weights, tmp_path):
    from experiments._random_clip import write_random_clip

    other = write_random_clip(tmp_path / "other", width=32, depth=1, max_len=16, seed=1)
    for argv in (("query", "--text", "a"), ("index",)):
        code, _, err = call(search.main, *argv, "--index", indexed, "--weights", other)
        assert code == 1 and "was made with the model in" in err


def test_zero_shot(call, images, weights, embedder):
    files = (images / "00.png", images / "more")
    argv = ("--weights", weights, "--images", *files, "--labels", "cat", "dog", "red square")
    code, out, _ = call(zero_shot.main, *argv)
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == str(images / "00.png") and lines[4] == str(images / "more/deep/18.JPG")
    shown = [float(line.split("%")[0]) for line in lines[1:4]]
    assert sum(shown) == pytest.approx(100, abs=0.02) and shown == sorted(shown, reverse=True)

    texts = [f"a photo of a {name}." for name in ("cat", "dog", "red square")]
    expected = embedder.probabilities(embedder.images(files[:1]), embedder.texts(texts))[0]
    code, out, _ = call(zero_shot.main, *argv, "--json")
    first = json.loads(out.splitlines()[0])
    got = [first["probabilities"][name] for name in ("cat", "dog", "red square")]
    np.testing.assert_allclose(got, expected, atol=1e-5)

    patterns = ("a {}", "the {}.")
    code, out, _ = call(zero_shot.main, *argv, "--json", "--template", *patterns)
    each = [embedder.texts([p.format(n) for n in ("cat", "dog", "red square")]) for p in patterns]
    mean = np.mean(each, axis=0)
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    expected = embedder.probabilities(embedder.images(files[:1]), mean)[0]
    got = json.loads(out.splitlines()[0])["probabilities"]
    np.testing.assert_allclose([got[n] for n in ("cat", "dog", "red square")], expected, atol=1e-5)


def test_zero_shot_refuses(call, images, weights, tmp_path):
    base = ("--weights", weights, "--images", images / "00.png")

    def says(*argv, code=1):
        got, _, err = call(zero_shot.main, *argv)
        assert got == code
        return err

    assert "give at least two" in says(*base, "--labels", "cat")
    assert "--top is 0" in says(*base, "--labels", "cat", "dog", "--top", 0)
    labels = ("--labels", "cat", "dog")
    assert "exactly one {}" in says(*base, *labels, "--template", "a {} {}")
    assert "did you mean 'photo'" in says(*base, *labels, "--template", "photos")
    assert "did you mean 'cifar10'" in says(*base, "--classes", "cifar")
    assert "no file of class names" in says(*base, "--classes", f"file:{tmp_path / 'x'}")
    lost = ("--weights", weights, "--images", tmp_path / "gone.png", *labels)
    assert "does not exist" in says(*lost)
    (tmp_path / "empty").mkdir()
    assert "holds no image" in says(*base[:2], "--images", tmp_path / "empty", *labels)
    (tmp_path / "broken.png").write_bytes(b"x")
    code, out, err = call(zero_shot.main, *base, tmp_path / "broken.png", *labels)
    assert code == 1 and "00.png" in out and "skipped" in err and "no known image" in err


def test_the_workdir_of_a_run(call, images, weights, tmp_path):
    """A run's own checkpoint, tokenizer and preprocessing take the place of a HF directory."""
    run = tmp_path / "run"
    write_orbax(mmjax.from_pretrained(weights), run, dtype=None, companions=None)
    stored = json.loads((run / "model.json").read_text())
    argv = ("index", "--weights", run, "--images", images, "--index", tmp_path / "index")
    code, _, err = call(search.main, *argv)
    assert code == 1 and "weights without preprocessing" in err
    train = dict(
        sources=[dict(name="digits")], image=dict(preset="clip", size=48), text=dict(max_len=16)
    )
    data = dict(tokenizer=dict(name="bpe", vocab_size=300), train=train)
    (run / "config.json").write_text(json.dumps({"model": stored["model"], "data": data}))
    (run / "model.json").unlink()
    code, out, _ = call(search.main, *argv)
    assert code == 0 and "21 images" in out
    argv = ("query", "--index", tmp_path / "index", "--image", images / "04.png", "--k", 1)
    _, out, _ = call(search.main, *argv, "--text", "seven")
    assert out.splitlines()[0] == "seven" and out.splitlines()[-1].endswith("04.png")
    code, _, err = call(search.main, *argv[:-4], "--text", "seven " * 17)
    assert code == 1 and "1 of 1 texts are longer than the 16 tokens" in err
    code, _, err = call(search.main, *argv, "--dtype", "bfloat16")
    assert code == 1 and "leave --dtype out" in err
    # Trained further, it is another model.
    (run / "checkpoints" / "0").rename(run / "checkpoints" / "7")
    state = next(p for p in sorted((run / "checkpoints/7/state").rglob("*")) if p.is_file())
    state.write_bytes(state.read_bytes() + b" ")
    code, _, err = call(search.main, *argv)
    assert code == 1 and "was made with the model in" in err


def test_the_benchmark_runs(weights, capfd):
    argv = ["--images", "200", "--size", "24", "--queries", "3", "--weights", str(weights)]
    assert bench.main(["search", *argv]) == 0
    out = capfd.readouterr().out
    assert "200 new, 0 changed, 0 removed" in out and "100 new, 100 changed, 100 removed" in out
    exact = next(line for line in out.splitlines() if line.startswith("exact"))
    assert "answers equal to brute force, recall@10 100.0%" in exact
