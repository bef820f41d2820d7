"""Turn a llama2.c checkpoint (karpathy/llama2.c, format v0) into a Hugging Face directory.

    python experiments/stories260k.py SOURCE_DIR TARGET_DIR

SOURCE_DIR holds stories260K.bin and tok512.bin (huggingface.co/karpathy/tinyllamas, folder
stories260K): a Llama of 260,032 parameters trained on TinyStories. TARGET_DIR, which must not exist
or be empty, gets config.json, model.safetensors, tokenizer.json and tokenizer_config.json. It takes
a second.
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from jax_lowrank.results import write_directory

CHECKPOINT, TOKENIZER = "stories260K.bin", "tok512.bin"
SPECIAL = ("<unk>", "<s>", "</s>")  # ids 0, 1, 2 of every llama2.c tokenizer
NUM_BYTES = 256  # the ids after them are <0x00> ... <0xFF>
SPACE = "▁"


class Header(NamedTuple):
    """The seven numbers that a checkpoint begins with; vocab_size is negative where the output
    table is not the embedding."""

    width: int
    mlp_width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    max_positions: int


class Piece(NamedTuple):
    """A token: its text with "▁" for a space, and the score by which merges are ordered."""

    text: str
    score: float


def read_checkpoint(path: Path) -> tuple[Header, dict[str, np.ndarray]]:
    """Header and float32 tensors under llama2.c's names, Linear weights (layers, out, in).

    Raises ValueError where the size of the file does not fit its header.
    """
    content = path.read_bytes()
    if len(content) < 28:
        raise ValueError(f"{path} has {len(content)} bytes; a llama2.c checkpoint has at least 28")
    header = Header(*struct.unpack_from("<7i", content))
    shapes = tensor_shapes(header)
    expected = 28 + 4 * sum(int(np.prod(shape)) for shape in shapes.values())
    if len(content) != expected:
        raise ValueError(
            f"{path} has {len(content)} bytes, its header {tuple(header)} asks for {expected};"
            " only version 0 of llama2.c's format is read"
        )
    tensors, start = {}, 28
    for name, shape in shapes.items():
        count = int(np.prod(shape))
        flat = np.frombuffer(content, "<f4", count, start)
        tensors[name], start = flat.reshape(shape), start + 4 * count
    return header, tensors


def tensor_shapes(h: Header) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors, in the order of the file (run.c, memory_map_weights)."""
    layers, head_width = h.num_layers, h.width // h.num_heads
    kv_width = h.num_kv_heads * head_width
    shapes = {
        "embedding": (abs(h.vocab_size), h.width),
        "rms_att": (layers, h.width),
        "wq": (layers, h.width, h.width),
        "wk": (layers, kv_width, h.width),
        "wv": (layers, kv_width, h.width),
        "wo": (layers, h.width, h.width),
        "rms_ffn": (layers, h.width),
        "w1": (layers, h.mlp_width, h.width),
        "w2": (layers, h.width, h.mlp_width),
        "w3": (layers, h.mlp_width, h.width),
        "rms_final": (h.width,),
        "freq_real": (h.max_positions, head_width // 2),
        "freq_imag": (h.max_positions, head_width // 2),
    }
    if h.vocab_size < 0:
        shapes["classifier"] = shapes["embedding"]
    return shapes


def hf_tensors(header: Header, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same tensors under the names, and in the rotary layout, of Hugging Face's Llama."""
    named = {
        "model.embed_tokens.weight": tensors["embedding"],
        "model.norm.weight": tensors["rms_final"],
    }
    if "classifier" in tensors:
        named["lm_head.weight"] = tensors["classifier"]
    for layer in range(header.num_layers):
        of = {name: tensor[layer] for name, tensor in tensors.items() if tensor.ndim > 1}
        prefix = f"model.layers.{layer}."
        named |= {
            prefix + "input_layernorm.weight": of["rms_att"],
            prefix + "self_attn.q_proj.weight": halve_pairs(of["wq"], header.num_heads),
            prefix + "self_attn.k_proj.weight": halve_pairs(of["wk"], header.num_kv_heads),
            prefix + "self_attn.v_proj.weight": of["wv"],
            prefix + "self_attn.o_proj.weight": of["wo"],
            prefix + "post_attention_layernorm.weight": of["rms_ffn"],
            prefix + "mlp.gate_proj.weight": of["w1"],
            prefix + "mlp.down_proj.weight": of["w2"],
            prefix + "mlp.up_proj.weight": of["w3"],
        }
    return {name: np.ascontiguousarray(tensor, np.float32) for name, tensor in named.items()}


def halve_pairs(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows (out, in) of each head from rotary pairs (2i, 2i + 1), llama2.c's, to (i, i + N/2),
    Hugging Face's (transformers, convert_llama_weights_to_hf.py, `permute`)."""
    out, width = weight.shape
    pairs = weight.reshape(num_heads, out // num_heads // 2, 2, width)
    return pairs.swapaxes(1, 2).reshape(out, width)


def hf_config(header: Header) -> dict:
    """config.json."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": abs(header.vocab_size),
        "num_hidden_layers": header.num_layers,
        "hidden_size": header.width,
        "num_attention_heads": header.num_heads,
        "num_key_value_heads": header.num_kv_heads,
        "head_dim": header.width // header.num_heads,
        "intermediate_size": header.mlp_width,
        "max_position_embeddings": header.max_positions,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": header.vocab_size > 0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }


def read_pieces(path: Path) -> list[Piece]:
    """The tokens of a llama2.c tokenizer: int32 longest; then float32 score, int32 length, bytes.

    Raises ValueError where the file ends within a token or does not begin with the usual ids.
    """
    content, start, pieces = path.read_bytes(), 4, []
    while start < len(content):
        if start + 8 > len(content):
            raise ValueError(f"{path} ends within token {len(pieces)}")
        score, length = struct.unpack_from("<fi", content, start)
        start += 8 + length
        if length < 0 or start > len(content):
            raise ValueError(f"{path} ends within token {len(pieces)}")
        text = content[start - length : start].decode()
        pieces.append(Piece(text.replace(" ", SPACE), score))
    first = len(SPECIAL)
    names = [piece.text for piece in pieces[first : first + NUM_BYTES]]
    if names != [f"<0x{byte:02X}>" for byte in range(NUM_BYTES)]:
        raise ValueError(f"{path}: ids {first} to {first + NUM_BYTES - 1} are not the 256 bytes")
    # llama2.c writes the special tokens with line ends around them
    return [Piece(name, 0.0) for name in SPECIAL] + pieces[first:]


def merges_of(pieces: list[Piece]) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token, best score of the made token first.

    SentencePiece merges the neighbours whose union scores best, which is what merging by rank does.
    """
    ids = {piece.text: number for number, piece in enumerate(pieces)}
    learned = pieces[len(SPECIAL) + NUM_BYTES :]
    merges = []
    for text, _ in sorted(learned, key=lambda piece: -piece.score):
        splits = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        known = [(left, right) for left, right in splits if left in ids and right in ids]
        merges += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return merges


def make_tokenizer(pieces: list[Piece]) -> Tokenizer:
    """The `tokenizers` BPE that encodes as llama2.c does: a space put in front, bytes for unknown
    characters, <s> first unless add_special_tokens=False."""
    vocab = {piece.text: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocab, merges_of(pieces), unk_token=SPECIAL[0], byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in SPECIAL]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def convert(source: Path, target: Path) -> Path:
    """Write the Hugging Face directory `target`, whole or not at all.

    Raises FileNotFoundError for a missing file, FileExistsError where `target` holds something,
    and ValueError for files that do not fit the format or each other.
    """
    for name in (CHECKPOINT, TOKENIZER):
        if not (source / name).is_file():
            raise FileNotFoundError(f"no {name} in {source}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not an empty folder; name a new one")
    header, tensors = read_checkpoint(source / CHECKPOINT)
    pieces = read_pieces(source / TOKENIZER)
    if len(pieces) != abs(header.vocab_size):
        raise ValueError(
            f"{TOKENIZER} has {len(pieces)} tokens, {CHECKPOINT} asks for {abs(header.vocab_size)}"
        )
    # A story ends where the next one's <s> is; run.c stops there. </s> never occurs in training:
    # its row equals those of all unused tokens, so a model with a frozen table cannot say it.
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "<s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": header.max_positions,
    }

    def write(folder: Path) -> None:
        metadata = {"format": "pt"}
        save_file(hf_tensors(header, tensors), folder / "model.safetensors", metadata=metadata)
        make_tokenizer(pieces).save(str(folder / "tokenizer.json"))
        for name, value in (
            ("tokenizer_config.json", tokenizer_config),
            ("config.json", hf_config(header)),
        ):
            (folder / name).write_text(json.dumps(value, indent=2) + "\n")

    return write_directory(target, write)


def main(args: list[str]) -> int:
    """Run the conversion; the exit code."""
    if len(args) != 2:
        print("usage: python experiments/stories260k.py SOURCE_DIR TARGET_DIR", file=sys.stderr)
        return 2
    try:
        print(convert(Path(args[0]), Path(args[1])))
    except (ValueError, OSError) as error:
        print(f"stories260k: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
