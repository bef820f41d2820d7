"""Examples to token ids, and which of the tokens are to be learnt."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jax_lowrank import data, masking
from jax_lowrank.tasks.task import TaskError


class Encoded(NamedTuple):
    """Token ids of N examples, cut to the longest length allowed.

    counted: for each token whether predicting it counts; None: all (and for classification, none).
    hidden: of masked-lm the texts as they are measured, always the same of a text and its number.
    """

    sequences: list[list[int]]
    counted: list[list[bool]] | None
    num_truncated: int
    hidden: list[masking.Hidden] | None = None


def encode(
    kind: str,
    ids: Sequence[str],
    inputs: Sequence[Any],
    text: Any,
    *,
    max_length: int,
    mask_prompt: bool = True,
) -> Encoded:
    """Token ids of examples of one kind (see tasks.text).

    text: a tokenizer and how it is used (study.parts.Text: tokenizer, vocab_size, bos, eos_id).
    mask_prompt: only completions and the assistant's turns count; False: every token does. Raises
    TaskError where nothing that counts is left within max_length, naming the row, and for a
    tokenizer without a chat template.
    """
    v = text
    if kind == "classification":
        return _with_own_special_tokens(ids, inputs, v, max_length)
    if kind == "masked-lm":
        return _with_hidden_tokens(ids, inputs, v, max_length)
    if kind == "text":
        tokens = data.tokenize(
            v.tokenizer,
            inputs,
            max_length=max_length,
            vocab_size=v.vocab_size,
            add_bos=v.bos,
            add_eos=v.eos_id is not None,
        )
        _check_something_counts(ids, tokens.sequences, [[True] * len(s) for s in tokens.sequences])
        return Encoded(tokens.sequences, None, tokens.num_truncated)
    if kind == "completion":
        pairs = [_completion(prompt, completion, v) for prompt, completion in inputs]
    else:
        check_template(v.tokenizer)
        pairs = [_conversation(row_id, example, v) for row_id, example in zip(ids, inputs)]
    cut = [(tokens[:max_length], counted[:max_length]) for tokens, counted in pairs]
    sequences, counted = [list(column) for column in zip(*cut)]
    _check_vocabulary(ids, sequences, v.vocab_size)
    if mask_prompt:
        before = [len(tokens) for tokens, _ in pairs]
        _check_something_counts(ids, sequences, counted, before)
    num_truncated = sum(len(tokens) > max_length for tokens, _ in pairs)
    return Encoded(sequences, counted if mask_prompt else None, num_truncated)


def encode_questions(
    ids: Sequence[str], texts: Sequence[str], text: Any, *, prompt: str, max_length: int
) -> Encoded:
    """Token ids of a prompt around each text; of a row that is too long, the text loses its end.

    prompt: holds {text} once. Raises TaskError where no token of a text fits beside the prompt.
    """
    before, after = prompt.split("{text}")
    start = [text.tokenizer.bos_token_id] if text.bos else []
    end = _plain(after, text)
    opened = [start + _plain(before + each, text) for each in texts]
    room = max_length - len(end)
    least = len(start) + len(_plain(before, text)) + 1
    if room < least:
        raise TaskError(
            f"the prompt alone takes {least - 1 + len(end)} of the {max_length} tokens allowed;"
            f" train.max_length must be {least + len(end)} at least"
        )
    sequences = [tokens[:room] + end for tokens in opened]
    _check_vocabulary(ids, sequences, text.vocab_size)
    return Encoded(sequences, None, sum(len(tokens) > room for tokens in opened))


def answer_tokens(words: Sequence[str], text: Any) -> list[int]:
    """The token of each answer word. Raises TaskError unless each is one token, and all differ."""
    tokens = [_plain(word, text) for word in words]
    for word, found in zip(words, tokens):
        if len(found) != 1:
            raise TaskError(
                f"the answer {word!r} is {len(found)} tokens, not one; try another word, or a space"
                " less or more before it, as the tokenizer wants it"
            )
    if len({found[0] for found in tokens}) < len(words):
        raise TaskError(f"the answers {', '.join(map(repr, words))} are not distinct tokens")
    return [found[0] for found in tokens]


def encode_prompts(prompts: Sequence[Any], text: Any, *, chat: bool) -> list:
    """Token ids of what a model is to continue: strings, or with `chat` conversations."""
    v = text
    if chat:
        check_template(v.tokenizer)
        encoded = [_render(v.tokenizer, messages, True) for messages in prompts]
    else:
        start = [v.tokenizer.bos_token_id] if v.bos else []
        encoded = [start + _plain(text, v) for text in prompts]
    for prompt, tokens in zip(prompts, encoded):
        if not tokens:
            raise TaskError(f"prompt {prompt!r} has no token, and the tokenizer no first token")
    _check_vocabulary([f"prompt {i}" for i in range(1, len(prompts) + 1)], encoded, v.vocab_size)
    return encoded


def check_template(tokenizer: Any) -> None:
    """Raise TaskError unless the tokenizer has a chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise TaskError(
            "the tokenizer has no chat template; use a chat model's tokenizer, or plain prompts and"
            " completions"
        )


def _plain(text: str, v: Any) -> list[int]:
    return list(v.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def _completion(prompt: str, completion: str, v: Any) -> tuple[list[int], list[bool]]:
    """Tokens of both, and which belong to the completion.

    Encoded together, as a text would be; a token that spans the border counts as completion.
    """
    start = [v.tokenizer.bos_token_id] if v.bos else []
    end = [v.eos_id] if v.eos_id is not None else []
    alone, whole = _plain(prompt, v), _plain(prompt + completion, v)
    shared = 0
    while shared < min(len(alone), len(whole)) and alone[shared] == whole[shared]:
        shared += 1
    tokens = start + whole + end
    masked = len(start) + shared
    return tokens, [False] * masked + [True] * (len(tokens) - masked)


def _conversation(row_id: str, messages: list[dict], v: Any) -> tuple[list[int], list[bool]]:
    """Tokens of a conversation under the tokenizer's template, and which are the assistant's."""
    if (
        "{% generation" in v.tokenizer.chat_template
        or "{%- generation" in v.tokenizer.chat_template
    ):
        out = v.tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return list(out["input_ids"]), [bool(m) for m in out["assistant_masks"]]
    whole = _render(v.tokenizer, messages, False)
    counted = [False] * len(whole)
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            begun = _render(v.tokenizer, messages[:turn], True)
            ended = _render(v.tokenizer, messages[: turn + 1], False)
            if whole[: len(begun)] != begun or whole[: len(ended)] != ended:
                raise TaskError(
                    f"{row_id}: the chat template writes message {turn + 1} differently once others"
                    " follow; mark the assistant's text in the template with {% generation %}"
                )
            counted[len(begun) : len(ended)] = [True] * (len(ended) - len(begun))
    return whole, counted


def _render(tokenizer: Any, messages: list[dict], add_generation_prompt: bool) -> list[int]:
    if not messages:
        return []
    try:
        out = tokenizer.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=True,
            add_generation_prompt=add_generation_prompt,
        )
    except Exception as error:  # a template may raise what it likes
        raise TaskError(f"the chat template refuses {messages[0]!r}...: {error}") from error
    return list(out["input_ids"])


def _with_own_special_tokens(
    ids: Sequence[str], texts: Sequence[str], v: Any, max_length: int
) -> Encoded:
    """As the tokenizer itself wraps a text, such as [CLS] ... [SEP]; these stay when it is cut."""
    whole = v.tokenizer(list(texts))["input_ids"]
    sequences = v.tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    for row_id, tokens in zip(ids, sequences):
        if not tokens:
            raise TaskError(f"{row_id}: the tokenizer makes no token of its text")
    _check_vocabulary(ids, sequences, v.vocab_size)
    num_truncated = sum(len(tokens) > max_length for tokens in whole)
    return Encoded([list(tokens) for tokens in sequences], None, num_truncated)


def masker_of(tokenizer: Any) -> masking.Masker:
    """What hides the tokens of a masked-lm run. Raises TaskError where there is no such token."""
    if getattr(tokenizer, "mask_token_id", None) is None:
        raise TaskError("the tokenizer has no mask token; masked-lm needs an encoder's")
    return masking.Masker(tokenizer.mask_token_id, len(tokenizer))


def _with_hidden_tokens(
    ids: Sequence[str], texts: Sequence[str], v: Any, max_length: int
) -> Encoded:
    masker, special = masker_of(v.tokenizer), set(v.tokenizer.all_special_ids)
    plain = _with_own_special_tokens(ids, texts, v, max_length)
    counted = [[token not in special for token in tokens] for tokens in plain.sequences]
    for row_id, usable in zip(ids, counted):
        if not any(usable):
            raise TaskError(f"{row_id}: all of its {len(usable)} tokens are special; none to hide")
    hidden = [
        masker.hide(tokens, usable, (number,))
        for number, (tokens, usable) in enumerate(zip(plain.sequences, counted))
    ]
    return Encoded(plain.sequences, counted, plain.num_truncated, hidden)


def _check_vocabulary(ids: Sequence[str], sequences: Sequence[list[int]], size: int) -> None:
    for row_id, tokens in zip(ids, sequences):
        if max(tokens, default=0) >= size:
            raise TaskError(
                f"{row_id}: token id {max(tokens)} is outside the model's vocabulary of {size}:"
                " tokenizer and model do not belong together"
            )


def _check_something_counts(
    ids: Sequence[str],
    sequences: Sequence[list[int]],
    counted: Sequence[list[bool]],
    lengths: Sequence[int] | None = None,
) -> None:
    """The first token is never predicted; of the others, one at least must count."""
    for row, (row_id, tokens, counts) in enumerate(zip(ids, sequences, counted)):
        if any(counts[1:]):
            continue
        if lengths is not None and lengths[row] > len(tokens):
            raise TaskError(
                f"{row_id}: its prompt fills all {len(tokens)} tokens of train.max_length, so that"
                f" nothing of its completion is learnt; it needs up to {lengths[row]}"
            )
        raise TaskError(f"{row_id}: {len(tokens)} token(s), none of them to predict")
