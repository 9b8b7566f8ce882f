"""Text and images become token ids, as the released model's `chat()` does it (facts nvlm-d.md section 5)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.model.spec import IM_END, IM_START, VISION_PAD, ModelSpec
from nvlm_deploy.model.tokenizer import open_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

IMAGE_PLACEHOLDER = "<image>"
THUMBNAIL_TAG = "<tile_global_thumbnail>"

Wrapper = Literal["chat", "chat_template", "raw"]
DEFAULT_SYSTEM = {
    "chat": "Answer the questions.",
    "chat_template": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "raw": None,
}


def image_span(tiles: int, tokens_per_tile: int) -> str:
    """The text that stands for one image of `tiles` tiles, thumbnail included and last.

    Tags are plain text. One tile has no thumbnail besides itself, and is tagged as the thumbnail (trap 6).
    """
    tags = [f"<tile_{number}>" for number in range(1, tiles)] + [THUMBNAIL_TAG]
    return "<Image>" + "".join(tag + VISION_PAD * tokens_per_tile for tag in tags) + "</Image>"


def with_images(question: str, spans: Sequence[str]) -> str:
    """The question with each `<image>` replaced, in order; a question without any gets them in front.

    Raises NvlmError when placeholders and images do not match in number.
    """
    placeholders = question.count(IMAGE_PLACEHOLDER)
    if placeholders == 0 and spans:
        question = f"{IMAGE_PLACEHOLDER}\n" * len(spans) + question
        placeholders = len(spans)
    if placeholders != len(spans):
        raise NvlmError(
            f"the text has {placeholders} {IMAGE_PLACEHOLDER} placeholder(s), the request {len(spans)} image(s)",
            hint=f"write {IMAGE_PLACEHOLDER} once per image, or leave it out and the images come first",
        )
    pieces = question.split(IMAGE_PLACEHOLDER)
    return pieces[0] + "".join(span + piece for span, piece in zip(spans, pieces[1:], strict=True))


def wrapped(question: str, wrapper: Wrapper, system: str | None) -> str:
    """The chat turn around a question.

    `chat`: the model's own `chat()`, no newline after `<|im_end|>`; `chat_template`: Qwen2.5's template, with it (trap
    7); `raw`: nothing around. `system=None` leaves the system turn out.
    """
    if wrapper == "raw":
        return question
    end = f"{IM_END}\n" if wrapper == "chat_template" else IM_END
    system_turn = "" if system is None else f"{IM_START}system\n{system}{end}"
    return f"{system_turn}{IM_START}user\n{question}{end}{IM_START}assistant\n"


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
        """Read `tokenizer.json`. Raises NvlmError when it is missing, damaged or lacks `<|vision_pad|>`."""
        if wrapper not in get_args(Wrapper):
            raise NvlmError(f"no prompt wrapper {wrapper!r}; there are {', '.join(get_args(Wrapper))}")
        self.tokenizer = open_tokenizer(tokenizer_file)
        self.tokens_per_tile = spec.tiling.tokens_per_tile
        self.vocab_size = spec.decoder.vocab_size
        self.wrapper: Wrapper = wrapper
        self.system = DEFAULT_SYSTEM[wrapper] if system == "default" else system
        self.pad_token_id = _special_id(self.tokenizer, VISION_PAD, tokenizer_file)

    def require_matches(self, spec: ModelSpec) -> None:
        """Raises NvlmError when the tokenizer is not the one that the model was trained with, as far as ids tell."""
        end = self.tokenizer.token_to_id(IM_END)
        if end not in spec.prompt.eos_token_ids:
            ends = ", ".join(map(str, spec.prompt.eos_token_ids))
            raise NvlmError(f"tokenizer.json has {IM_END} as id {end}, the checkpoint's eos_token_id is {ends}")
        self._require_whole_marks()

    def _require_whole_marks(self) -> None:
        """Each mark of a prompt must stay one token, whatever the tokenizer's file says of spaces and words around."""
        text, ids = self.text("?", [1]), self.ids("?", [1])
        for mark in (IM_START, IM_END, VISION_PAD):
            found = ids.count(_special_id(self.tokenizer, mark, Path("tokenizer.json")))
            if found != text.count(mark):
                raise NvlmError(
                    f"tokenizer.json makes {found} tokens {mark} of a prompt that has {text.count(mark)}",
                    hint="fetch the tokenizer files of the checkpoint again; `nvlm inspect` lists what they change",
                )

    def text(self, question: str, tiles_per_image: Sequence[int] = ()) -> str:
        """The whole prompt as text; `tiles_per_image` counts thumbnails."""
        spans = [image_span(tiles, self.tokens_per_tile) for tiles in tiles_per_image]
        return wrapped(with_images(_without_pads(question), spans), self.wrapper, self.system)

    def ids(self, question: str, tiles_per_image: Sequence[int] = ()) -> list[int]:
        """Token ids; the positions of visual tokens hold the id of `<|vision_pad|>`."""
        text = self.text(question, tiles_per_image)
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def prompt_table_ids(self, question: str, tiles_per_image: Sequence[int] = ()) -> list[int]:
        """Token ids as TensorRT-LLM's prompt tuning wants them: visual positions are numbered from vocab_size on."""
        ids = self.ids(question, tiles_per_image)
        return with_prompt_table_ids(ids, pad_token_id=self.pad_token_id, vocab_size=self.vocab_size)


def with_prompt_table_ids(ids: Sequence[int], *, pad_token_id: int, vocab_size: int) -> list[int]:
    """Visual position number n gets id `vocab_size + n`: row n of the prompt embedding table (contract C.1)."""
    rows: Iterator[int] = iter(range(vocab_size, vocab_size + len(ids)))
    return [next(rows) if token == pad_token_id else token for token in ids]


def _without_pads(question: str) -> str:
    """A user's own `<|vision_pad|>` would claim a row of the prompt table."""
    if VISION_PAD in question:
        raise NvlmError(
            f"the text contains the reserved token {VISION_PAD}", hint="remove it; images are added for you"
        )
    return question


def _special_id(tokenizer: Tokenizer, token: str, path: Path) -> int:
    token_id = tokenizer.token_to_id(token)
    if token_id is None:
        raise NvlmError(f"{path} has no token {token}: not the tokenizer of NVLM-D")
    return int(token_id)
