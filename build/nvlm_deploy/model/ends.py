"""The token ids that end an answer, read from a checkpoint's files as transformers reads them. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from nvlm_deploy.errors import NvlmError

END_KEY, PAD_KEY, BEGIN_KEY = "eos_token_id", "pad_token_id", "bos_token_id"
GENERATION_NAME = "generation_config.json"

# a file's settings and what they are called in messages
Named = tuple[str, Mapping[str, Any]]


def settings_of_generation(config: Mapping[str, Any], generation: Mapping[str, Any]) -> Sequence[Named]:
    """Where generation's settings stand, the strongest place first.

    transformers reads generation_config.json, and config.json only where that file is missing. A file without end ids
    would make it generate for ever: config.json's are used then.
    """
    llm = config.get("llm_config")
    return (
        (GENERATION_NAME, generation),
        ("config.json", config),
        ("llm_config", llm if isinstance(llm, Mapping) else {}),
    )


def end_ids(places: Sequence[Named], vocab_size: int) -> tuple[int, ...]:
    """The ids that end an answer: one number or a list, of the first place that states any; each once, in its order.

    Raises NvlmError when none does, or when an id is no whole number within the vocabulary.
    """
    for place, settings in places:
        value = settings.get(END_KEY)
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not ids or not all(_is_whole(token) for token in ids):
            raise NvlmError(
                f"{place}.{END_KEY} is {value!r}, expected a token id, a whole number, or a list of such ids",
                hint=f"fetch {place if place.endswith('.json') else 'config.json'} of the checkpoint again",
            )
        for token in ids:
            _require_within(token, f"{place}.{END_KEY}", vocab_size)
        return tuple(dict.fromkeys(ids))
    raise NvlmError(
        f"{' and '.join(place for place, _ in places)} have no {END_KEY}: an answer would never end",
        hint=f"fetch {GENERATION_NAME} and config.json of the checkpoint again",
    )


def pad_id(places: Sequence[Named], vocab_size: int, *, default: int) -> int:
    """The id that fills batches up, of which no result depends: of padding, else of the beginning, else `default`."""
    for key in (PAD_KEY, BEGIN_KEY):
        for _, settings in places:
            token = settings.get(key)
            if _is_whole(token) and 0 <= token < vocab_size:
                return token
    return default


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _require_within(token: int, name: str, vocab_size: int) -> None:
    if not 0 <= token < vocab_size:
        raise NvlmError(f"{name} is {token}, outside the vocabulary of {vocab_size}")
