"""Examples to tokens: what counts is the completion, or what the assistant says."""

import pytest
import tiny_text

from jax_lowrank.study.prepare import text_of
from jax_lowrank.tasks.encode import encode, encode_prompts
from jax_lowrank.tasks.task import TaskError


def words(**options):
    return text_of(tiny_text.tokenizer(**options))


def run(kind, inputs, text=None, *, max_length=40, **options):
    ids = [f"f:{i}" for i in range(1, len(inputs) + 1)]
    return encode(kind, ids, inputs, text or words(), max_length=max_length, **options)


def shown(text, encoded, row=0):
    """(token, whether it counts) of one row."""
    tokens = text.tokenizer.convert_ids_to_tokens(encoded.sequences[row])
    return list(zip(tokens, encoded.counted[row]))


def test_only_the_completion_counts():
    text = words()
    encoded = run("completion", [("the cat is", " in the box")], text)
    assert shown(text, encoded) == [
        ("<eos>", False),
        ("the", False),
        ("cat", False),
        ("is", False),
        ("in", True),
        ("the", True),
        ("box", True),
        ("<eos>", True),
    ]
    assert run("completion", [("the cat is", " in")], text, mask_prompt=False).counted is None
    alone = run("completion", [("", "in the box")], text)
    assert alone.counted[0] == [False, True, True, True, True]


def test_a_token_over_the_border_counts():
    """'the ca' + 't' is one word: encoded together, and no prompt token is left of it."""
    text = words()
    encoded = run("completion", [("the ca", "t is")], text)
    assert shown(text, encoded)[1:] == [
        ("the", False),
        ("cat", True),
        ("is", True),
        ("<eos>", True),
    ]


CHAT = tiny_text.chats(1)[0]["messages"]


@pytest.mark.parametrize("marked", [False, True])
def test_the_assistants_turns_count(marked):
    text = words(chat=True)
    if marked:  # a template that says itself what the assistant wrote
        text.tokenizer.chat_template = (
            "{% for m in messages %}<{{ m.role }}> {% if m.role == 'assistant' %}{% generation %}"
            "{{ m.content }} <end>{% endgeneration %} {% else %}{{ m.content }} <end> {% endif %}"
            "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
        )
    encoded = run("chat", [CHAT], text)
    counting = [token for token, counts in shown(text, encoded) if counts]
    assert counting == ["in", "the", "box", ".", "<end>", "yes", "<end>"]
    begun = [token for token, _ in shown(text, encoded)][:2]
    assert begun == ["<user>", "where"]


def test_a_template_that_rewrites_the_past_is_refused():
    text = words(chat=True)
    text.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}> {{ m.content if loop.last else 'no' }} <end> "
        "{% endfor %}"
    )
    with pytest.raises(TaskError, match=r"f:1: the chat template writes message 2 differently"):
        run("chat", [CHAT], text)


def test_no_template_is_said():
    for call in (
        lambda: run("chat", [CHAT]),
        lambda: encode_prompts([CHAT[:1]], words(), chat=True),
    ):
        with pytest.raises(TaskError, match="the tokenizer has no chat template"):
            call()


def test_what_is_cut_is_counted_and_nothing_left_is_an_error():
    encoded = run("completion", [("the cat", " in the box"), ("a", " b")], max_length=5)
    assert encoded.num_truncated == 1 and [len(s) for s in encoded.sequences] == [5, 4]
    with pytest.raises(TaskError, match=r"f:1: its prompt fills all 3 tokens .* needs up to 5"):
        run("completion", [("the cat", " in")], max_length=3)
    assert run("completion", [("the cat", " in")], max_length=3, mask_prompt=False)
    assert run("text", ["the cat is in the box"], max_length=4).num_truncated == 1


def test_classification_keeps_the_tokenizers_own_special_tokens():
    from tokenizers import processors

    text = words()
    inner = text.tokenizer.backend_tokenizer
    first, last = inner.token_to_id("<user>"), inner.token_to_id("<end>")
    inner.post_processor = processors.TemplateProcessing(
        single="<user> $A <end>", special_tokens=[("<user>", first), ("<end>", last)]
    )
    encoded = run("classification", ["the cat is in the box", "no"], text, max_length=5)
    assert [(s[0], s[-1], len(s)) for s in encoded.sequences] == [
        (first, last, 5),
        (first, last, 3),
    ]
    assert encoded.num_truncated == 1 and encoded.counted is None


def test_tokens_outside_the_model_and_empty_rows_are_refused():
    small = words()._replace(vocab_size=10)
    for kind, row in (("completion", ("the", " now")), ("classification", "now")):
        with pytest.raises(TaskError, match=r"f:1: token id \d+ is outside the model's vocabulary"):
            run(kind, [row], small)
    with pytest.raises(TaskError, match="f:1: the tokenizer makes no token"):
        run("classification", [""], words())
    with pytest.raises(TaskError, match=r"f:1: 1 token\(s\), none of them to predict"):
        run("text", ["cat"], words(bos=False)._replace(eos_id=None))


def test_prompts_begin_as_training_rows_do():
    text = words(chat=True)
    plain = encode_prompts(["the cat is"], text, chat=False)[0]
    whole = run("completion", [("the cat is", " in")], text).sequences[0]
    assert whole[: len(plain)] == plain
    chat = encode_prompts([CHAT[:1]], text, chat=True)[0]
    encoded = run("chat", [CHAT[:2]], text)
    assert encoded.sequences[0][: len(chat)] == chat
    assert encoded.counted[0].index(True) == len(chat)
