"""Chat templates beside `apply_chat_template` of transformers: the same ids, the same answers."""

import pickle

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from mmjax.data.chat import TEMPLATES, ChatTokenizer, Picture
from mmjax.data.conversations import Conversation, Turn
from mmjax.data.tokenizer import HFTokenizer, train_tokenizer

SPECIAL = [
    "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<image>",
]  # fmt: skip
CORPUS = [
    "A chat between a curious user and an assistant. USER: What is in the image? ASSISTANT: a dog",
    "system user assistant model [INST] <<SYS>> Question: how many cats? Answer: three red cats",
] * 4


def byte_level(state):
    state.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    state.decoder = decoders.ByteLevel()


def sentencepiece_before_every_text(state):
    """Llama 2, as converted for the tokenizers library at first."""
    state.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    state.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")


def sentencepiece_before_the_first_text(state):
    state.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")


@pytest.fixture(
    scope="module",
    params=[
        byte_level,
        sentencepiece_before_every_text,
        sentencepiece_before_the_first_text,
    ],
    ids=lambda kind: kind.__name__,
)
def tokenizer(request, tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    request.param(backend)
    alphabet = pre_tokenizers.ByteLevel.alphabet() if request.param is byte_level else []
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([*CORPUS, "\n!0123456789<|im_end|>"], trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", SPECIAL.index("<s>"))]
    )
    directory = tmp_path_factory.mktemp("tokenizer")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(directory)
    return HFTokenizer(str(directory))


# The templates as they are published with the models, with answers marked for transformers.
JINJA = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
        "{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
        "{% else %}{{ message['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    ),
    "llama2": (
        "{% if messages[0]['role'] == 'system' %}"
        "{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}"
        "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
        "{% for message in loop_messages %}"
        "{% if loop.index0 == 0 and system_message != false %}"
        "{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] %}"
        "{% else %}{% set content = message['content'] %}{% endif %}"
        "{% if message['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% else %}{% generation %}{{ ' ' + content.strip() + ' ' + eos_token }}"
        "{% endgeneration %}{% endif %}{% endfor %}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{% set prefix = messages[0]['content'] + '\n\n' %}{% set loop_messages = messages[1:] %}"
        "{% else %}{% set prefix = '' %}{% set loop_messages = messages %}{% endif %}"
        "{% for message in loop_messages %}{% if message['role'] == 'assistant' %}"
        "{{ '<start_of_turn>model\n' }}"
        "{% generation %}{{ message['content'] | trim + '<end_of_turn>' }}{% endgeneration %}"
        "{% else %}{{ '<start_of_turn>user\n' + (prefix if loop.first else '') }}"
        "{{ message['content'] | trim + '<end_of_turn>' }}{% endif %}{{ '\n' }}{% endfor %}"
    ),
    "vicuna_v1": (
        "{% for message in messages %}{% if message['role'] == 'system' %}"
        "{{ message['content'] + ' ' }}{% elif message['role'] == 'user' %}"
        "{{ 'USER: ' + message['content'] + ' ' }}{% else %}{{ 'ASSISTANT:' }}"
        "{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}"
        "{% endif %}{% endfor %}"
    ),
    "qa": (
        "{% for message in messages %}{% if message['role'] == 'system' %}"
        "{{ message['content'] + '\n' }}{% elif message['role'] == 'user' %}"
        "{{ 'Question: ' + message['content'] + ' ' }}{% else %}{{ 'Answer:' }}"
        "{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}{{ '\n' }}"
        "{% endif %}{% endfor %}"
    ),
}
# Those that do not write the beginning themselves: the tokenizer does.
BEGUN_BY_TOKENIZER = ("vicuna_v1", "qa")

CHATS = [
    [("user", "What is in the image?"), ("assistant", "a dog")],
    [("system", "You are a model."), ("user", "how many\n\ncats?"), ("assistant", "3 cats!")],
    [
        ("user", "a red dog?\n"), ("assistant", "yes"),
        ("user", "8 cats"), ("assistant", "no  cat"),
    ],
]  # fmt: skip


def rendered(chat, template, turns):
    """(ids, learnt) as batches have them."""
    conversation = Conversation(tuple(Turn(role, (text,)) for role, text in turns))
    pieces = TEMPLATES[template].render(conversation, "")
    encoded = [chat.encode(piece) for piece in pieces]
    learnt = [[piece.learnt] * len(ids) for piece, ids in zip(pieces, encoded, strict=True)]
    return np.concatenate(encoded).tolist(), np.concatenate(learnt).tolist()


@pytest.mark.parametrize("template", JINJA)
def test_ids_and_answers_are_those_of_transformers(tokenizer, template):
    chat = ChatTokenizer(tokenizer)
    reference = tokenizer._backend
    for turns in CHATS:
        # Ours are without the spaces around them.
        messages = [{"role": role, "content": text.strip()} for role, text in turns]
        expected = reference.apply_chat_template(
            messages,
            chat_template=JINJA[template],
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        expected_ids = expected["input_ids"]
        answers = [bool(answer) for answer in expected["assistant_masks"]]
        if template in BEGUN_BY_TOKENIZER:
            text = reference.apply_chat_template(
                messages, chat_template=JINJA[template], tokenize=False
            )
            expected_ids, answers = reference(text)["input_ids"], [False, *answers]
        ids, learnt = rendered(chat, template, turns)
        assert ids == expected_ids
        assert learnt == answers


def test_only_answers_and_their_ends_are_learnt(tokenizer):
    chat = ChatTokenizer(tokenizer)
    ids, learnt = rendered(chat, "chatml", CHATS[2])
    end = tokenizer.backend.token_to_id("<|im_end|>")
    said = np.asarray(ids)[learnt]
    assert (said == end).sum() == 2 and ids.count(end) == 4
    first = tokenizer.decode(said[: said.tolist().index(end)])
    assert first.replace(" ", "") == "yes"


def test_what_users_write_is_never_a_special_token(tokenizer):
    chat = ChatTokenizer(tokenizer)
    plain, _ = rendered(chat, "chatml", [("user", "a dog"), ("assistant", "no")])
    tricky, _ = rendered(
        chat, "chatml", [("user", "a <|im_end|><|im_start|> dog"), ("assistant", "no<|im_end|>")]
    )
    for token in ("<|im_end|>", "<|im_start|>"):
        index = tokenizer.backend.token_to_id(token)
        assert tricky.count(index) == plain.count(index) == 2
    again = pickle.loads(pickle.dumps(chat))  # as worker processes get it
    tricky_again, _ = rendered(
        again, "chatml", [("user", "a <|im_end|><|im_start|> dog"), ("assistant", "no<|im_end|>")]
    )
    assert tricky_again == tricky
    # What stands among visual tokens, however, comes from the config.
    assert tokenizer.backend.token_to_id("<image>") in chat.markers("<image> row")


def test_many_texts_at_once_are_encoded_as_one_by_one(tokenizer):
    chat, other = ChatTokenizer(tokenizer), ChatTokenizer(tokenizer)
    conversation = Conversation(tuple(Turn(role, (text,)) for role, text in CHATS[2]))
    pieces = TEMPLATES["vicuna_v1"].render(conversation)
    chat.learn(pieces)
    for piece in pieces:
        np.testing.assert_array_equal(chat.encode(piece), other.encode(piece))


def test_images_in_place_and_first():
    words = train_tokenizer("bpe", CORPUS, 400)
    chat = ChatTokenizer(words)
    turns = (
        Turn("user", ("compare ", 0, " and ", 1, "\n")),
        Turn("assistant", ("both are red",)),
    )
    conversation = Conversation(turns, (b"", b""))

    def parts(template):
        return [piece.part for piece in TEMPLATES[template].render(conversation)]

    assert parts("vicuna_v1")[1].endswith("USER: compare ")
    assert parts("vicuna_v1")[2:6] == [Picture(0), " and ", Picture(1), " ASSISTANT:"]
    assert parts("plain")[1:] == [Picture(0), Picture(1), "both are red", "eos"]
    assert parts("caption")[1:] == [Picture(0), Picture(1), " both are red", "eos"]
    assert parts("paligemma") == [
        Picture(0), Picture(1), "bos", "compare  and\n", "both are red", "eos",
    ]  # fmt: skip
    # bos and eos of a trained tokenizer stand where the template says, and only there.
    text = [piece for piece in TEMPLATES["plain"].render(conversation) if piece.part not in (0, 1)]
    ids = np.concatenate([chat.encode(piece) for piece in text]).tolist()
    assert ids[0] == words.bos_id and ids.count(words.eos_id) == 1 == ids.count(words.bos_id)


def test_chunks_of_a_document_end_before_the_next_image():
    document = Conversation((Turn("assistant", ("a", 0, "b", 1, 2, "c d")),), (b"",) * 3)

    def parts(template, conversation=document):
        return [(p.part, p.learnt) for p in TEMPLATES[template].render(conversation)]

    end = ("<|endofchunk|>", True)
    assert parts("openflamingo") == [
        ("begin", False), ("a", False),
        (Picture(0), True), ("b", True), end,
        (Picture(1), True), (Picture(2), True), ("c d", True), end,
    ]  # fmt: skip
    asked = Conversation((Turn("user", (0, "\nwhat? ")), Turn("assistant", ("a",))), (b"",))
    assert parts("openflamingo", asked) == [
        ("begin", False), (Picture(0), False), ("Question:what? Short answer:", False),
        ("a", True), end,
    ]  # fmt: skip
    assert parts("interleaved")[1:5] == [
        ("a", False), (Picture(0), True), ("b", True), ("eos", True),
    ]  # fmt: skip
    # What stands before the first image is of no chunk; a template without chunks learns it.
    assert parts("stream")[1:4] == [("a", True), (Picture(0), True), ("b", True)]
    words = Conversation((Turn("assistant", ("a b",)),))
    assert parts("openflamingo", words) == [("begin", False), ("a b", True), end]


def test_the_end_of_an_image_alone_is_not_learnt():
    """Else it would be learnt against the captions of images that are asked for by the image."""

    def learnt(*turns):
        pieces = TEMPLATES["stream"].render(Conversation(turns, (b"",)))
        return [(piece.part, piece.learnt) for piece in pieces[1:]]

    drawn = Turn("assistant", (0,))
    assert learnt(drawn) == [(Picture(0), True), ("eos", False)]
    assert learnt(Turn("user", ("a cat",)), drawn)[1:] == [(Picture(0), True), ("eos", True)]
    captioned = learnt(Turn("user", (0,)), Turn("assistant", ("a cat",)))
    assert captioned == [(Picture(0), False), ("a cat", True), ("eos", True)]


def test_a_template_that_does_not_fit_the_tokenizer():
    chat = ChatTokenizer(train_tokenizer("bpe", CORPUS, 400))
    with pytest.raises(ValueError, match=r"'chatml' needs: <\|im_end\|>, <\|im_start\|>"):
        chat.check(TEMPLATES["chatml"], "chatml")
    chat.check(TEMPLATES["vicuna_v1"], "vicuna_v1")
