"""Text and images become token ids, as the released model's `chat()` does it (facts nvlm-d.md section 5).

A prompt is a list of parts. A string is text and is encoded as text, whatever it contains; only a tuple of ids can hold
a control token, and only the wrapper and the images make such tuples. So a user's `<|im_end|>` is ten characters, not
the end of a turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.model.spec import IM_END, IM_START, VISION_PAD, ModelSpec
from nvlm_deploy.model.tokenizer import open_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

IMAGE_PLACEHOLDER = "<image>"
ESCAPED_PLACEHOLDER = "\\<image>"
THUMBNAIL_TAG = "<tile_global_thumbnail>"

Wrapper = Literal["chat", "chat_template", "raw"]
DEFAULT_SYSTEM = {
    "chat": "Answer the questions.",
    "chat_template": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "raw": None,
}

# text to encode, ids to take as they are, or a seam (no ids) that keeps the texts at its sides apart
Part = str | tuple[int, ...]
SEAM: tuple[int, ...] = ()
# where a user's own tag is cut: inside its first word, since `<` and `tile` are tokens of the real tag too
_TAG = re.compile(r"(</?Im)(?=age>)|(<ti)(?=le_(?:\d+|global_thumbnail)>)")
_PLACEHOLDER = re.compile(r"\\?<image>")


def tags_of(tiles: int) -> list[str]:
    """Return the tags of an image's tiles, thumbnail included and last.

    One tile has no thumbnail besides itself, and is tagged as the thumbnail (trap 6).
    """
    return [*(f"<tile_{number}>" for number in range(1, tiles)), THUMBNAIL_TAG]


def image_span(tiles: int, tokens_per_tile: int) -> str:
    """Return the text that stands for one image of `tiles` tiles, with its visual tokens spelled out."""
    return "<Image>" + "".join(tag + VISION_PAD * tokens_per_tile for tag in tags_of(tiles)) + "</Image>"


def question_pieces(question: str, images: int) -> list[str]:
    """Return the texts between the images: one more than there are images.

    Without images the question is taken as it stands. With images each `<image>` is the place of one, in order, and
    `\\<image>` is the text `<image>`; a question without any place gets the images in front. Raises NvlmError when
    places and images differ in number.
    """
    if not images:
        return [question]
    pieces, places = [""], 0
    position = 0
    for match in _PLACEHOLDER.finditer(question):
        pieces[-1] += question[position : match.start()]
        position = match.end()
        if match.group() == ESCAPED_PLACEHOLDER:
            pieces[-1] += IMAGE_PLACEHOLDER
        else:
            places += 1
            pieces.append("")
    pieces[-1] += question[position:]
    if places == 0:
        return ["", *["\n"] * (images - 1), f"\n{pieces[0]}"]
    if places != images:
        raise NvlmError(
            f"the text has {places} {IMAGE_PLACEHOLDER} placeholder(s), the request {images} image(s)",
            hint=f"write {IMAGE_PLACEHOLDER} once per image, or leave it out and the images come first; "
            f"{ESCAPED_PLACEHOLDER} is the text {IMAGE_PLACEHOLDER}",
        )
    return pieces


def without_tags(text: str) -> Iterator[Part]:
    """Yield the text with a seam inside each tile or image tag, so that it gets other ids than a real tag."""
    position = 0
    for match in _TAG.finditer(text):
        yield text[position : match.end()]
        yield SEAM
        position = match.end()
    yield text[position:]


class PromptBuilder:
    """Builds prompts for one checkpoint; keeps the tokenizer."""

    def __init__(
        self,
        tokenizer_file: Path,
        spec: ModelSpec,
        *,
        wrapper: Wrapper = "chat",
        system: str | Literal["default"] | None = "default",
    ) -> None:
        """Read `tokenizer.json`. Raises NvlmError when it is missing, damaged or lacks a control token.

        `wrapper` is the chat turn around a question. `chat` is the model's own `chat()`, without a newline after
        `<|im_end|>`; `chat_template` is Qwen2.5's template, with it (trap 7). `raw` is for trusted callers: nothing is
        put around the text, and control tokens in it count. `system=None` leaves the system turn out.
        """
        if wrapper not in get_args(Wrapper):
            raise NvlmError(f"no prompt wrapper {wrapper!r}; there are {', '.join(get_args(Wrapper))}")
        self.tokenizer = open_tokenizer(tokenizer_file)
        self.plain = without_added_tokens(self.tokenizer)
        self.tokens_per_tile = spec.tiling.tokens_per_tile
        self.vocab_size = spec.decoder.vocab_size
        self.wrapper: Wrapper = wrapper
        self.system = DEFAULT_SYSTEM[wrapper] if system == "default" else system
        self.pad_token_id = _special_id(self.tokenizer, VISION_PAD, tokenizer_file)
        self._start = (_special_id(self.tokenizer, IM_START, tokenizer_file),)
        self._end = (_special_id(self.tokenizer, IM_END, tokenizer_file),)

    @property
    def longest_token_bytes(self) -> int:
        """Bytes of the longest token: a text of n bytes has at least n / this many tokens."""
        return max(len(token) for token in self.plain.get_vocab())

    def require_matches(self, spec: ModelSpec) -> None:
        """Raises NvlmError when the tokenizer is not the one that the model was trained with, as far as ids tell."""
        end = self.tokenizer.token_to_id(IM_END)
        if end not in spec.prompt.eos_token_ids:
            ends = ", ".join(map(str, spec.prompt.eos_token_ids))
            raise NvlmError(f"tokenizer.json has {IM_END} as id {end}, the checkpoint's eos_token_id is {ends}")
        self._require_whole_marks()

    def _require_whole_marks(self) -> None:
        """Each mark of a prompt must stay one token, whatever the tokenizer's file says of spaces and words around."""
        text = self.text("?", [1])
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        for mark in (IM_START, IM_END, VISION_PAD):
            found = ids.count(_special_id(self.tokenizer, mark, Path("tokenizer.json")))
            if found != text.count(mark):
                raise NvlmError(
                    f"tokenizer.json makes {found} tokens {mark} of a prompt that has {text.count(mark)}",
                    hint="fetch the tokenizer files of the checkpoint again; `nvlm inspect` lists what they change",
                )

    def parts(self, question: str, tiles_per_image: Sequence[int] = ()) -> list[Part]:
        """Return the whole prompt; `tiles_per_image` counts thumbnails."""
        asked = self._question_parts(question, tiles_per_image)
        if self.wrapper == "raw":
            return asked
        newline = "\n" if self.wrapper == "chat_template" else ""
        system: list[Part] = []
        if self.system is not None:
            system = [self._start, f"system\n{self.system}", self._end, newline]
        return [*system, self._start, "user\n", *asked, self._end, newline, self._start, "assistant\n"]

    def text(self, question: str, tiles_per_image: Sequence[int] = ()) -> str:
        """Return the prompt as text for people; what is a control token in it cannot be told from a user's text."""
        parts = self.parts(question, tiles_per_image)
        return "".join(part if isinstance(part, str) else self._spelled(part) for part in parts)

    def ids(self, question: str, tiles_per_image: Sequence[int] = ()) -> list[int]:
        """Return token ids; the positions of visual tokens hold the id of `<|vision_pad|>`."""
        groups = list(_joined(self.parts(question, tiles_per_image)))
        encoded = iter(self._encoded([group for group in groups if isinstance(group, str)]))
        return [token for group in groups for token in (next(encoded) if isinstance(group, str) else group)]

    def prompt_table_ids(self, question: str, tiles_per_image: Sequence[int] = ()) -> list[int]:
        """Return token ids as TensorRT-LLM's prompt tuning wants them: visual positions count from vocab_size on."""
        ids = self.ids(question, tiles_per_image)
        return with_prompt_table_ids(ids, pad_token_id=self.pad_token_id, vocab_size=self.vocab_size)

    def words(self, text: str) -> tuple[int, ...]:
        """Return the ids of a word alone, as plain text."""
        return tuple(self._encoded([text])[0])

    def _question_parts(self, question: str, tiles_per_image: Sequence[int]) -> list[Part]:
        if self.wrapper == "raw" and VISION_PAD in question:
            raise NvlmError(
                f"the text contains the reserved token {VISION_PAD}", hint="remove it; images are added for you"
            )
        first, *rest = question_pieces(question, len(tiles_per_image))
        parts = [*self._user_text(first, bool(rest))]
        for tiles, piece in zip(tiles_per_image, rest, strict=True):
            parts += [*self._image_parts(tiles), *self._user_text(piece, has_images=True)]
        return parts

    def _user_text(self, text: str, has_images: bool) -> Iterator[Part]:
        """Yield text of the user. Only where tiles are given does a tag mean one, so only there is it cut."""
        if has_images and self.wrapper != "raw":
            yield from without_tags(text)
        else:
            yield text

    def _image_parts(self, tiles: int) -> Iterator[Part]:
        yield "<Image>"
        for tag in tags_of(tiles):
            yield tag
            yield (self.pad_token_id,) * self.tokens_per_tile
        yield "</Image>"

    def _encoded(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text. A batch is encoded without Python's lock, so that a long text stops nobody."""
        tokenizer = self.tokenizer if self.wrapper == "raw" else self.plain
        return [encoding.ids for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def _spelled(self, ids: tuple[int, ...]) -> str:
        return "".join(self.tokenizer.id_to_token(token) or "" for token in ids)


def _joined(parts: Sequence[Part]) -> Iterator[Part]:
    """Yield the parts with neighbouring texts in one piece: a token may reach across their border."""
    text = ""
    for part in parts:
        if isinstance(part, str):
            text += part
            continue
        if text:
            yield text
        text = ""
        yield part
    if text:
        yield text


def with_prompt_table_ids(ids: Sequence[int], *, pad_token_id: int, vocab_size: int) -> list[int]:
    """Return the ids with visual position number n as `vocab_size + n`: row n of the prompt table (contract C.1)."""
    rows: Iterator[int] = iter(range(vocab_size, vocab_size + len(ids)))
    return [next(rows) if token == pad_token_id else token for token in ids]


def without_added_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """Return the same tokenizer without added tokens: it finds no control token in a text, whatever the text says.

    The library matches added tokens before anything else and cannot be told not to (`encode_special_tokens` splits
    them, but keeps the plain added ones).
    """
    from tokenizers import Tokenizer

    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = []
    return Tokenizer.from_str(json.dumps(content))


def _special_id(tokenizer: Tokenizer, token: str, path: Path) -> int:
    token_id = tokenizer.token_to_id(token)
    if token_id is None:
        raise NvlmError(f"{path} has no token {token}: not the tokenizer of NVLM-D")
    return int(token_id)
