"""Settings whose meaning depends on another file, on the model's sizes or on its weights. The rest is in table.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from nvlm_deploy.checkpoint.reader import INDEX_NAME, Checkpoint, read_json
from nvlm_deploy.model.ends import END_KEY, end_ids, settings_of_generation
from nvlm_deploy.model.foreign.setting import (
    CONFIG,
    GENERATION,
    LLM,
    PREPROCESSOR,
    TOKENIZER,
    TOKENIZER_CONFIG,
    TOKENIZER_MODEL,
    WEIGHTS,
    Documents,
    Finding,
    Treatment,
    shown,
)
from nvlm_deploy.model.foreign.table import TILING_KEYS
from nvlm_deploy.model.prompt import DEFAULT_SYSTEM
from nvlm_deploy.model.spec import (
    DEFAULT_ROTARY_BASE,
    IM_END,
    IM_START,
    IMAGENET_MEAN,
    IMAGENET_STD,
    ROPE_PLACES,
    VISION_PAD,
    ModelSpec,
)

# both name the id that stands for an image in other models' prompts
_IMAGE_TOKENS = ("image_token_index", "image_token_id", "img_context_token_id")
# where transformers 5 keeps a tokenizer's template
CHAT_TEMPLATE_NAME = "chat_template.jinja"
# tokens that transformers leaves out of a text whatever tokenizer.json says of them
_NAMED_SPECIAL = (
    "additional_special_tokens",
    "bos_token",
    "eos_token",
    "pad_token",
    "unk_token",
    "sep_token",
    "cls_token",
)
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")


def relations(documents: Documents, checkpoint: Checkpoint, spec: ModelSpec) -> Iterator[Finding]:
    """Every finding that takes more than one value."""
    yield from _rotary_base(documents)
    yield from _ends(documents, spec)
    yield from _image_tokens(documents, checkpoint)
    if TOKENIZER in documents.places:
        yield from _vocabulary(documents, spec)
        yield from _shown_marks(documents, spec)
        yield from _added_tokens(documents)
    yield from _chat_templates(documents, checkpoint)
    yield from _preprocessing(documents, spec)
    yield from _tiling(documents)
    yield from _weights(checkpoint)


def _rotary_base(documents: Documents) -> Iterator[Finding]:
    places = (documents.value(LLM, key) for key in ROPE_PLACES)
    parameters: Mapping[str, Any] = next((value for value in places if value), {})
    inner, outer = parameters.get("rope_theta"), documents.value(LLM, "rope_theta")
    if inner is None and outer is None:
        effect = f"{DEFAULT_ROTARY_BASE:g} is used, transformers' default for Qwen2; NVLM-D-72B has 1e+06"
        yield Finding(Treatment.ASSUMED, LLM, "rope_theta", "", effect)
    elif inner is not None and outer is not None and inner != outer:
        effect = f"{inner} of rope_parameters is used, as transformers does"
        yield Finding(Treatment.HONOURED, LLM, "rope_theta", shown(outer), effect)


def _ends(documents: Documents, spec: ModelSpec) -> Iterator[Finding]:
    ends, generation = spec.prompt.eos_token_ids, documents.places.get(GENERATION)
    if generation is not None and generation.get(END_KEY) is None:
        effect = "config.json's is used; transformers would never end"
        yield Finding(Treatment.ASSUMED, GENERATION, END_KEY, "", effect)
    elif len(ends) > 1 or (generation and set(ends) != _ends_of_config(documents, spec)):
        place = GENERATION if generation else CONFIG
        effect = "each of them ends an answer" if len(ends) > 1 else "used as in transformers, not config.json's"
        yield Finding(Treatment.HONOURED, place, END_KEY, shown(list(ends)), effect)


def _ends_of_config(documents: Documents, spec: ModelSpec) -> set[int]:
    places = settings_of_generation(documents.places[CONFIG], {})
    stated = any(settings.get(END_KEY) is not None for _, settings in places)
    return set(end_ids(places, spec.decoder.vocab_size)) if stated else set(spec.prompt.eos_token_ids)


def _image_tokens(documents: Documents, checkpoint: Checkpoint) -> Iterator[Finding]:
    pad = checkpoint.added_token_id(VISION_PAD)
    for key in _IMAGE_TOKENS:
        value = documents.value(CONFIG, key)
        if value is not None and value != pad:
            effect = f"not obeyed: images take the places of {VISION_PAD}, id {pad}"
            yield Finding(Treatment.NEUTRALISED, CONFIG, key, shown(value), effect)


def _vocabulary(documents: Documents, spec: ModelSpec) -> Iterator[Finding]:
    """Ids that two tokens share, ids the model has no row for, and tokens that are no bytes."""
    if "decoder" not in documents.places[TOKENIZER]:
        effect = "only ByteLevel is supported: tokens are bytes of text"
        yield Finding(Treatment.REFUSED, TOKENIZER, "decoder", "missing", effect)
    vocabulary = _ids_of_vocabulary(documents)
    twice = [token for token, count in Counter(vocabulary.values()).items() if count > 1]
    if twice:
        names = [name for name, token in vocabulary.items() if token == twice[0]]
        effect = f"id {twice[0]} is that of {len(names)} tokens: each must have its own"
        yield Finding(Treatment.REFUSED, TOKENIZER_MODEL, "vocab", shown(names), effect)
    ids = {**vocabulary, **{token["content"]: token["id"] for token in _added(documents)}}
    beyond = [(name, token) for name, token in ids.items() if token >= spec.decoder.vocab_size]
    if beyond:
        effect = f"outside the model's vocabulary of {spec.decoder.vocab_size}, as {len(beyond)} token(s) are"
        yield Finding(Treatment.REFUSED, TOKENIZER, f"id of {beyond[0][0]}", shown(beyond[0][1]), effect)
    yield from _letters(vocabulary, {token["content"] for token in _added(documents)})


def _ids_of_vocabulary(documents: Documents) -> dict[str, int]:
    """The tokenizers library refuses a vocabulary of another kind when it is opened."""
    vocabulary = documents.value(TOKENIZER_MODEL, "vocab")
    entries = vocabulary.items() if isinstance(vocabulary, Mapping) else ()
    return {name: token for name, token in entries if isinstance(token, int)}


def _letters(vocabulary: Mapping[str, Any], added: set[str]) -> Iterator[Finding]:
    """Letters that stand for no byte, and bytes that have no letter."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters: set[str] = set().union(*(name for name in vocabulary if name not in added))
    alphabet = set(ByteLevel.alphabet())
    if letters - alphabet:
        effect = "not letters of byte-level BPE: such tokens are no bytes of text"
        strange = shown("".join(sorted(letters - alphabet)))
        yield Finding(Treatment.REFUSED, TOKENIZER_MODEL, "vocab", strange, effect)
    if alphabet - set(vocabulary):
        effect = "as in transformers, text with these bytes' letters loses them: no token stands for them"
        lacking = shown("".join(sorted(alphabet - set(vocabulary))))
        yield Finding(Treatment.HONOURED, TOKENIZER_MODEL, "vocab lacks", lacking, effect)


def _added(documents: Documents) -> list[Mapping[str, Any]]:
    added = documents.value(TOKENIZER, "added_tokens")
    tokens = [token for token in added if isinstance(token, Mapping)] if isinstance(added, list) else []
    return [token for token in tokens if isinstance(token.get("id"), int) and isinstance(token.get("content"), str)]


def _shown_marks(documents: Documents, spec: ModelSpec) -> Iterator[Finding]:
    """Marks of a turn and ends of an answer that an answer would show."""
    marks = {IM_START, IM_END, VISION_PAD}
    for token in _added(documents):
        is_mark = token["content"] in marks or token["id"] in spec.prompt.eos_token_ids
        if is_mark and token.get("special") is not True:
            effect = "only true is supported: an answer would show the token"
            key = f"special of {token['content']}"
            yield Finding(Treatment.REFUSED, TOKENIZER, key, shown(token.get("special")), effect)


def _added_tokens(documents: Documents) -> Iterator[Finding]:
    added = _added(documents)
    for flag in _FLAGS:
        names = [token["content"] for token in added if token.get(flag)]
        if names:
            effect = "the tokenizer does as the file says; NVLM-D's own says so of none"
            yield Finding(Treatment.HONOURED, TOKENIZER, f"added_tokens.{flag}", shown(names), effect)
    ordinary = {token["content"] for token in added if not token.get("special")}
    for key in _NAMED_SPECIAL:
        names = [name for name in _texts(documents, key) if name in ordinary]
        if names:
            effect = "not obeyed: an answer shows them, since tokenizer.json does not call them special"
            yield Finding(Treatment.NEUTRALISED, TOKENIZER_CONFIG, key, shown(names), effect)
    other = list(_decoded_otherwise(documents, {token["id"]: token for token in added}))
    if other:
        effect = "not obeyed: tokenizer.json says otherwise, and it alone is read"
        yield Finding(Treatment.NEUTRALISED, TOKENIZER_CONFIG, "added_tokens_decoder", shown(other), effect)


def _texts(documents: Documents, key: str) -> list[str]:
    """The tokens of a key: one or a list, each a text or an object that holds it."""
    values = documents.value(TOKENIZER_CONFIG, key)
    entries = values if isinstance(values, list) else [values]
    texts = [entry.get("content") if isinstance(entry, Mapping) else entry for entry in entries]
    return [text for text in texts if isinstance(text, str)]


def _decoded_otherwise(documents: Documents, added: Mapping[int, Mapping[str, Any]]) -> Iterator[str]:
    """Tokens to which tokenizer_config.json gives another id, flag or text than tokenizer.json."""
    decoder = documents.value(TOKENIZER_CONFIG, "added_tokens_decoder")
    for key, token in (decoder if isinstance(decoder, Mapping) else {}).items():
        ours = added.get(int(key), {}) if str(key).isdecimal() else {}
        if isinstance(token, Mapping) and any(
            token.get(name, ours.get(name)) != ours.get(name) for name in ("content", "special", *_FLAGS)
        ):
            yield str(token.get("content"))


def _chat_templates(documents: Documents, checkpoint: Checkpoint) -> Iterator[Finding]:
    """Templates other than the two that a wrapper writes, by their marks and their system sentence."""
    stated = documents.value(TOKENIZER_CONFIG, "chat_template")
    texts = {(TOKENIZER_CONFIG, "chat_template"): "" if stated is None else str(stated)}
    file = checkpoint.folder / CHAT_TEMPLATE_NAME
    if file.is_file():
        texts[CHAT_TEMPLATE_NAME, "chat_template"] = file.read_text(encoding="utf-8", errors="replace")
    sentences = [sentence for sentence in DEFAULT_SYSTEM.values() if sentence]
    for (place, key), text in texts.items():
        if text and not (IM_START in text and any(sentence in text for sentence in sentences)):
            effect = "not obeyed: the prompt is what the profile's serving.wrapper writes"
            yield Finding(Treatment.NEUTRALISED, place, key, shown(text), effect)


def _preprocessing(documents: Documents, spec: ModelSpec) -> Iterator[Finding]:
    for key, ours in (("image_mean", IMAGENET_MEAN), ("image_std", IMAGENET_STD)):
        value = documents.value(PREPROCESSOR, key)
        if value is not None and value != list(ours):
            effect = f"only {list(ours)} is supported: the engine normalises tiles with it"
            yield Finding(Treatment.REFUSED, PREPROCESSOR, key, shown(value), effect)
    for key in ("size", "crop_size"):
        value = documents.value(PREPROCESSOR, key)
        sides = list(value.values()) if isinstance(value, Mapping) else [value]
        if value is not None and any(side != spec.tiling.tile_size for side in sides):
            effect = f"only the model's {spec.tiling.tile_size} is supported, the size of a tile"
            yield Finding(Treatment.REFUSED, PREPROCESSOR, key, shown(value), effect)


def _tiling(documents: Documents) -> Iterator[Finding]:
    for key in TILING_KEYS:
        theirs, ours = documents.value(PREPROCESSOR, key), documents.value(CONFIG, key)
        if theirs is not None and theirs != ours:
            effect = "not obeyed: config.json decides how an image is tiled"
            yield Finding(Treatment.NEUTRALISED, PREPROCESSOR, key, shown(theirs), effect)


def _weights(checkpoint: Checkpoint) -> Iterator[Finding]:
    wide = sorted({info.dtype for info in checkpoint.infos.values()} - {"BF16"})
    if wide:
        effect = "rounded where they are not quantised: the decoder's to BF16, the encoder's to vision.precision"
        yield Finding(Treatment.NEUTRALISED, WEIGHTS, "dtype", shown(wide), effect)
    path = checkpoint.folder / INDEX_NAME
    metadata = read_json(path).get("metadata") if path.is_file() else None
    total = metadata.get("total_size") if isinstance(metadata, Mapping) else None
    if total is not None and total != checkpoint.size_bytes:
        effect = f"not used: the shards hold {checkpoint.size_bytes} bytes of tensors"
        yield Finding(Treatment.NEUTRALISED, INDEX_NAME, "metadata.total_size", shown(total), effect)
