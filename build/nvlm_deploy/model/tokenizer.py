"""The one place that opens a tokenizer.json: what training left in it does not reach a prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvlm_deploy.errors import NvlmError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_HINT = "fetch the tokenizer files of the checkpoint again"


def open_tokenizer(path: Path) -> Tokenizer:
    """Read tokenizer.json, without truncation, padding and random merges.

    They are undone here and not in the file: a repository's copy has the checkpoint's bytes, so that `nvlm verify`
    compares them, and a copy that somebody swaps is no less safe. Raises NvlmError for a file that is missing or
    damaged, or whose added tokens get other ids than it states.
    """
    if not path.is_file():
        raise NvlmError(f"no tokenizer.json at {path}", hint="fetch the tokenizer files of the checkpoint")
    tokenizer = _read(path)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None
    _require_stated_ids(tokenizer, path)
    return tokenizer


def text_without_leftovers(path: Path) -> str | None:
    """tokenizer.json as another program may read it: without what `open_tokenizer` undoes; None where it has none."""
    document = json.loads(path.read_text(encoding="utf-8"))
    model = document.get("model") or {}
    if not (document.get("truncation") or document.get("padding") or model.get("dropout")):
        return None
    neutral = {"truncation": None, "padding": None, "model": {**model, "dropout": None}}
    return json.dumps({**document, **neutral}, ensure_ascii=False)


def _read(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as problem:  # the Rust side raises plain Exception, and BaseException where it panics
        raise NvlmError(f"{path} is not a readable tokenizer.json: {problem}", hint=_HINT) from problem


def _require_stated_ids(tokenizer: Tokenizer, path: Path) -> None:
    """The library numbers added tokens itself where the stated id is taken or leaves a gap, and says nothing."""
    stated: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")).get("added_tokens") or []
    for token in stated:
        found = tokenizer.token_to_id(token["content"])
        if found != token["id"]:
            raise NvlmError(
                f"{path}: the added token {token['content']!r} has id {token['id']}, which another token has or which "
                f"leaves a gap; the tokenizers library gives it {found}",
                hint=_HINT,
            )
