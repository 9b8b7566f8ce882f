"""The small model's tokenizer: byte-level BPE with the release's pre-tokenizer, special tokens and token seams."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

# Qwen2's pre-tokenizer, verbatim: digits stand alone, `><` stays together, a closing `>` takes the newlines after it.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Qwen2.5's 22 added tokens in their order (facts: ids 151643..151664 there); the last eight are not "special" upstream.
CONTROL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
TOOL_TOKENS = [
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
]

# Every piece becomes one token. `<tile` is left out on purpose: the released tokenizer writes a tag in five tokens
# (`<` `tile` `_` `1` `>`), and an image of n tiles takes (tokens_per_tile + 5) n + 4 ids here exactly as it does there.
PIECES = [
    "<Image",
    "Image",
    "</",
    "><",
    "tile",
    "_global",
    "_thumbnail",
    "system",
    "user",
    "assistant",
    "Answer",
    " the",
    " questions",
    "Which",
    " digit",
    " is",
    " in",
    " tile",
    "Read",
    " all",
    " digits",
    " order",
    "How",
    " many",
    " tiles",
    " show",
    " largest",
    "What",
    " plus",
    "You",
    " are",
    " a",
    " helpful",
]

MAX_TOKENS = 512


def build_tokenizer() -> Tokenizer:
    """The tokenizer, always the same; ValueError when a piece is not one token or the vocabulary reaches 512."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_TOKENS, min_frequency=1, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(PIECES, trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in CONTROL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in TOOL_TOKENS])
    _check(tokenizer)
    return tokenizer


def write_tokenizer(path: Path) -> Tokenizer:
    """Write `tokenizer.json` and return what was written."""
    tokenizer = build_tokenizer()
    tokenizer.save(str(path), pretty=False)
    return tokenizer


def _check(tokenizer: Tokenizer) -> None:
    broken = [piece for piece in PIECES if len(tokenizer.encode(piece).ids) != 1]
    if broken:
        raise ValueError(f"these pieces are not one token: {broken}")
    if tokenizer.get_vocab_size() >= MAX_TOKENS:
        raise ValueError(f"{tokenizer.get_vocab_size()} tokens: the vocabulary must stay under {MAX_TOKENS}")


if __name__ == "__main__":
    built = build_tokenizer()
    print(built.get_vocab_size(), built.encode("<Image><tile_1>").tokens, built.encode("</Image>\nWhich").tokens)
