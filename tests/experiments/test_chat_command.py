"""`python -m experiments.generate` with images and in conversations, on tiny models."""

import json
import shutil

import hf
import jax
import numpy as np
import pytest
from PIL import Image

import mmjax
from experiments import generate
from experiments._random_vlm import write_random_vlm
from experiments.convert import write_orbax
from mmjax.data.conversations import Conversation, Turn
from mmjax.evaluate.chat import Dialogue, open_speaker

NEW = 8
QUESTIONS = ("what is in this image ?", "compare both pictures in detail .")


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Programs that run once are compiled with less effort."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_random_vlm(tmp_path_factory.mktemp("models") / "llava")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Files of two."""
    folder, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    files = [folder / "one.png", folder / "two.png"]
    for file, size in zip(files, ((30, 40), (24, 24)), strict=True):
        Image.fromarray(draw.integers(0, 255, (*size, 3), np.uint8)).save(file)
    return files


@pytest.fixture(scope="module")
def run_directory(directory, tmp_path_factory):
    """What a run leaves behind, without the running."""
    model = mmjax.from_pretrained(directory)
    path = tmp_path_factory.mktemp("runs") / "run"
    write_orbax(model, path, None, None)
    conversation = dict(
        template="qa",
        max_len=24,  # shorter than what is said below: of rows of training, not of the model
        images=1,
        layout=dict(name="tiles", preset="clip", size=24, tokens=9, rows=1, columns=2),
        image_token=model.config.image_token,
        pack=True,
    )
    sources = [dict(name="json", path="nowhere.json", form="llava")]
    data = dict(
        tokenizer=dict(name="hf", directory=str(directory)),
        train=dict(sources=sources, conversation=conversation),
    )
    stored = json.loads((path / "model.json").read_text())
    (path / "config.json").write_text(json.dumps({"model": stored["model"], "data": data}))
    return path


def run(weights, *arguments):
    arguments = [str(argument) for argument in arguments]
    return generate.main(["--weights", str(weights), "--max-new-tokens", str(NEW), *arguments])


def typed(monkeypatch, *lines):
    """These lines are typed; then the input ends."""
    left = iter(lines)

    def ask(prompt):
        line = next(left, None)
        if line is None:
            raise EOFError
        return str(line)

    monkeypatch.setattr("builtins.input", ask)


def test_writes_what_generate_returns(directory, images, capsys):
    processor = mmjax.load_processor(directory)
    texts = [f"<image> {QUESTIONS[0]}", "yes <image>"]
    batch = processor(images=[[images[0]]] * 2, text=texts)
    rows = mmjax.generate(
        mmjax.from_pretrained(directory), **batch, max_new_tokens=NEW, eos_id=3, pad_id=3
    )
    expected = processor.batch_decode(rows)
    assert expected[0] != expected[1]
    prompts = [part for text in texts for part in ("--prompt", text)]
    run(directory, "--image", images[0], *prompts)
    assert capsys.readouterr().out.splitlines() == expected


@pytest.mark.torch
def test_a_conversation_is_that_of_transformers(directory, images, monkeypatch, capsys):
    """Word for word, with all that was said and shown before."""
    transformers = hf.transformers()
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(directory).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    pixels = transformers.CLIPImageProcessorPil.from_pretrained(directory)
    messages, expected = [], []
    for number, question in enumerate(QUESTIONS):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        messages.append({"role": "user", "content": content})
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        seen = [Image.open(file) for file in images[: number + 1]]
        inputs = tokenizer(text.replace("<image>", "<image>" * 9), return_tensors="pt")
        out = theirs.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            pixel_values=pixels(seen, return_tensors="pt")["pixel_values"],
            max_new_tokens=NEW,
            do_sample=False,
        )
        answer = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        expected.append(answer)
    assert len(set(expected)) == 2

    typed(monkeypatch, f"/image {images[1]}", QUESTIONS[1])
    run(directory, "--interactive", "--image", images[0], "--prompt", QUESTIONS[0])
    written = capsys.readouterr().out.splitlines()
    assert [line for line in written if line in expected] == expected
    for option in ("--chat", "--stream"):  # A question about an image is a message.
        run(directory, "--image", images[0], "--prompt", QUESTIONS[0], option)
        assert capsys.readouterr().out == expected[0] + "\n"


def test_orders(directory, images, monkeypatch, capsys):
    """What cannot be done is told and leaves no trace; /reset forgets all."""
    speaker = open_speaker(directory)
    fresh = Dialogue(speaker).say(QUESTIONS[0], images[:1], max_new_tokens=NEW)
    typed(
        monkeypatch,
        f"/image {images[0]}",
        QUESTIONS[0],
        "/image nowhere.png",
        "<image> where ?",
        "/rest",
        "/reset",
        f"/image {images[0]}",
        QUESTIONS[0],
        "/quit",
        "never said",
    )
    run(directory, "--interactive")
    told = capsys.readouterr()
    answers = [line for line in told.out.splitlines() if line == fresh]
    assert len(answers) == 2
    errors = told.err.splitlines()
    assert "'nowhere.png' does not exist" in errors[0]
    assert "1 places '<image>' for 0 image(s)" in errors[1]
    assert "did you mean '/reset'" in errors[2] and len(errors) == 3


def test_answers_are_drawn_anew(directory, monkeypatch, capsys):
    """Of one seed, in a conversation that begins again."""
    typed(monkeypatch, "/reset", "where ?")
    options = ("--interactive", "--temperature", "2", "--prompt", "where ?")
    run(directory, *options)
    first = capsys.readouterr().out.splitlines()
    typed(monkeypatch, "/reset", "where ?")
    run(directory, *options)
    assert capsys.readouterr().out.splitlines() == first
    assert first[4] != first[6]


def test_a_run_answers_in_its_template(run_directory, images, capsys):
    """The prompt is what training had before the answer."""
    speaker = open_speaker(run_directory)
    files = tuple(image.read_bytes() for image in images)
    turns = (
        Turn("user", (0, "\nwhat is it?")),
        Turn("assistant", ("a cat",)),
        Turn("user", (1, "\nis it?")),
    )
    prompt = speaker.speech.prompt(Conversation(turns, files))
    # 2 tiles of the first image, which is wide, and 1 of the other.
    assert prompt.images.shape == (3, 24, 24, 3)
    assert prompt.place[prompt.place >= 0].tolist() == list(range(27))
    words = speaker.speech.decode(prompt.ids[prompt.place == -1])
    assert words == "question : what is it ? answer : a cat question : is it ? answer :"
    dialogue = Dialogue(speaker)
    first = dialogue.say("what is it?", files[:1], max_new_tokens=NEW)
    second = dialogue.say("is it?", files[1:], max_new_tokens=NEW)
    assert dialogue.turns[::2] == (turns[0], turns[2]) and first != second
    run(run_directory, "--image", images[0], "--prompt", "what is it?")
    assert capsys.readouterr().out == first + "\n"


BAD = {
    ("--prompt", "x", "--image", "none.png"): "'none.png' does not exist",
    ("--prompt", "x", "--image", "text.png"): "text.png cannot be read: .* no known image format",
    ("--prompt", "<image> <image> x", "--image", "ONE"): "2 '<image>' but 1 image",
    ("--prompt", "<image> <image> x", "--image", "ONE", "--chat"): "2 places '<image>' for 1 image",
    ("--prompt", "x", "--system", "y"): "give --chat",
    (): "Give a --prompt, or --interactive",
    ("--interactive", "--beams", "2"): "beams end all at once",
    ("--interactive", "--prompt", "x", "--prompt", "y"): "begins with one --prompt",
    ("--prompt", "x", "--weights", "RUN", "--dtype", "bfloat16"): "computes in the type of its",
    ("--prompt", "x", "--weights", "BARE"): "nothing that prepares images for it",
}


@pytest.mark.parametrize("arguments", BAD, ids=" ".join)
def test_bad_input(directory, run_directory, images, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.png").write_text("no picture")
    bare = shutil.copytree(directory, tmp_path / "bare")
    (bare / "processor_config.json").unlink()
    names = {"ONE": images[0], "RUN": run_directory, "BARE": bare}
    with pytest.raises(ValueError, match=BAD[arguments]):
        run(directory, *(names.get(argument, argument) for argument in arguments))


def test_a_text_model_takes_no_images(directory, images, tmp_path):
    model = mmjax.from_pretrained(directory)
    path = tmp_path / "text"
    mmjax.save_pretrained(model.lm, path, architecture="LlamaForCausalLM")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(directory / file, path / file)
    with pytest.raises(ValueError, match="takes no images: leave out --image"):
        run(path, "--prompt", "x", "--image", images[0])
    with pytest.raises(ValueError, match="takes no images: it reads text alone"):
        Dialogue(open_speaker(path)).say("x", images[:1], max_new_tokens=1)
