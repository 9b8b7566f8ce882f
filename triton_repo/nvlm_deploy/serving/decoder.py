"""Triton model `tensorrt_llm` on the cpu profile: the reference decoder behind the C++ backend's own interface.

It makes the answer's text as well, which in front of the C++ backend is the work of `text_decoder`.
Every input of contract C.3 is known by name: it is honoured, or has no effect here, or a value that would change the
answer is refused by name. Nothing is ignored silently.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nvlm_deploy import tensors
from nvlm_deploy.errors import NvlmError
from nvlm_deploy.model.fused import fused
from nvlm_deploy.model.reference import decoder_from_trtllm
from nvlm_deploy.serving import backend
from nvlm_deploy.serving.answer_text import AnswerText, Ending, Piece
from nvlm_deploy.serving.kv_cache import SlottedKvCache
from nvlm_deploy.serving.reference import ReferenceEngine
from nvlm_deploy.serving.sampling import SamplingSettings
from nvlm_deploy.serving.scheduler import Generation, Progress, Scheduler
from nvlm_deploy.serving.settings import TOKENIZER_FILE, ServingSettings
from nvlm_deploy.serving.stopping import StopReceiver
from nvlm_deploy.serving.token_bytes import TokenBytes
from nvlm_deploy.serving.word_list import Word, single_tokens

# sampling inputs by their name in SamplingSettings
_SAMPLING = {
    "temperature": "temperature",
    "runtime_top_k": "top_k",
    "runtime_top_p": "top_p",
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "min_tokens": "min_tokens",
    "seed": "seed",
}
_HONOURED = {
    *_SAMPLING,
    *("input_ids", "input_lengths", "request_output_len", "end_id", "stop_words_list", "bad_words_list"),
    *("streaming", "stop", "exclude_input_in_output", "prompt_embedding_table", "prompt_vocab_size", "stop_texts"),
}
# no effect without beams, KV reuse or padding; both token counts are always returned
_WITHOUT_EFFECT = {
    *("pad_id", "prompt_table_extra_ids", "return_num_input_tokens", "return_num_output_tokens"),
    *("len_penalty", "early_stopping", "beam_search_diversity_rate"),
}
# refused unless they ask for what is done anyway
_ONLY_VALUE = {
    "beam_width": 1,
    "num_return_sequences": 1,
    "return_log_probs": False,
    "return_context_logits": False,
    "return_generation_logits": False,
    "return_perf_metrics": False,
}
_SPECS = {spec.name: spec for spec in tensors.DECODER_INPUTS}
_COMPUTE_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# FP8 for a checkpoint with an FP8 cache; in the wider types such a cache holds the same values
_KV_CACHE_TYPES = {**_COMPUTE_TYPES, "float8_e4m3fn": torch.float8_e4m3fn}


class TritonPythonModel:
    """What Triton calls; decoupled: responses leave through the scheduler's thread."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the checkpoint beside `model.py` and start the scheduler."""
        backend.set_up_logging()
        settings = ServingSettings(args)
        torch.set_num_threads(settings.integer("threads"))
        self.max_seq_len = settings.integer("max_seq_len")
        self.engine = engine_from_settings(settings)
        self.vocab_size = self.engine.decoder.spec.vocab_size
        self.hidden_size = self.engine.decoder.spec.hidden_size
        self.scheduler = Scheduler(
            self.engine,
            max_waiting=settings.integer("max_waiting_requests"),
            max_prefill_tokens=settings.integer("max_num_tokens"),
        )
        self.token_bytes = TokenBytes(settings.folder / TOKENIZER_FILE)
        self.scheduler.start()
        self.stopping = StopReceiver(self.scheduler.cancel)

    def execute(self, requests: list[Any]) -> None:
        """Queue the requests; returns at once.

        A request with `stop` ends the one of its own id, as the C++ backend's does, among those that were sent to this
        model: the ensemble's bear ids of many clients.
        """
        for request in requests:
            sender = request.get_response_sender()
            try:
                if _is_set(request, tensors.STOP):
                    self.scheduler.cancel_named(id_to_stop(request))
                    backend.send_last(sender, empty_response(backend.wanted_outputs(request)))
                    continue
                generation = self._generation(request)
                answer = AnswerText(self.token_bytes, ending_of(generation, request))
                wanted = backend.wanted_outputs(request)
                sink = ResponseSink(sender, generation, answer, wanted, in_pieces=_is_set(request, tensors.STREAMING))
                if not _is_set(request, tensors.EXCLUDE_INPUT_IN_OUTPUT):
                    sink.prepend_prompt()
                self.scheduler.submit(generation, sink)
            except Exception as problem:
                backend.send_last(sender, backend.error_response(problem))

    def finalize(self) -> None:
        """Fail what runs and end the threads."""
        self.stopping.close()
        self.scheduler.stop()

    def _generation(self, request: Any) -> Generation:
        refuse_unsupported(request)
        prompt = self._prompt(request)
        max_tokens = required(request, tensors.REQUEST_OUTPUT_LEN)
        require_fits(len(prompt), max_tokens, self.max_seq_len)
        end_id = backend.scalar(request, tensors.END_ID)
        return Generation(
            prompt=prompt,
            max_tokens=max_tokens,
            end_id=-1 if end_id is None else int(end_id),
            table=self._prompt_table(request),
            sampling=sampling_settings(request),
            stop_words=backend.words(request, tensors.STOP_WORDS_LIST),
            bad_words=self._bad_words(request),
            request_id=str(request.request_id()),
            can_be_named=backend.array(request, tensors.STOP_TEXTS) is None,
        )

    def _prompt(self, request: Any) -> tuple[int, ...]:
        ids = backend.array(request, tensors.INPUT_IDS)
        length = required(request, tensors.INPUT_LENGTHS)
        if ids is None or not 0 < length <= ids.size:
            raise NvlmError(f"input_lengths is {length}, input_ids has {0 if ids is None else ids.size} ids")
        prompt: list[int] = ids.reshape(-1)[:length].tolist()
        if min(prompt) < 0:
            raise NvlmError(f"input_ids holds {min(prompt)}: ids are not negative")
        return tuple(prompt)

    def _prompt_table(self, request: Any) -> torch.Tensor | None:
        """[rows, hidden], copied out of the request's shared memory. BF16 has no numpy form, hence DLPack."""
        tensor = backend.backend_module().get_input_tensor_by_name(request, tensors.PROMPT_EMBEDDING_TABLE.name)
        if tensor is None:
            return None
        table = torch.utils.dlpack.from_dlpack(tensor.to_dlpack()).clone()
        rows = backend.scalar(request, tensors.PROMPT_VOCAB_SIZE)
        if tuple(table.shape) != (1, rows, self.hidden_size):
            raise NvlmError(
                f"prompt_embedding_table has shape {list(table.shape)}, expected [1, {rows}, {self.hidden_size}]: "
                f"prompt_vocab_size and hidden_size"
            )
        return table[0]

    def _bad_words(self, request: Any) -> tuple[Word, ...]:
        words = backend.words(request, tensors.BAD_WORDS_LIST)
        if any(not 0 <= token < self.vocab_size for word in words for token in word):
            raise NvlmError(f"bad_words_list holds ids outside the vocabulary of {self.vocab_size}")
        return words


def required(request: Any, spec: tensors.TensorSpec) -> int:
    """The one number of an input that must be there."""
    value = backend.scalar(request, spec)
    if value is None:
        raise NvlmError(f"input {spec.name} is missing")
    return int(value)


def id_to_stop(request: Any) -> str:
    """Whose generation a `stop` request ends; NvlmError without an id, which would be every anonymous request's."""
    request_id = str(request.request_id())
    if not request_id:
        raise NvlmError("stop without a request id", hint="set the id of the request that is to end")
    return request_id


def ending_of(generation: Generation, request: Any) -> Ending:
    """Return how the answer's text ends: at any end id, and at any stop text."""
    return Ending(
        end_ids=frozenset({generation.end_id, *single_tokens(generation.stop_words)}),
        max_tokens=generation.max_tokens,
        stop_words=tuple(word.decode("utf-8") for word in backend.texts(request, tensors.STOP_TEXTS)),
        min_tokens=generation.sampling.min_tokens,
    )


class ResponseSink:
    """Turns the scheduler's progress into Triton responses: one per token, or one in all."""

    def __init__(
        self, sender: Any, generation: Generation, answer: AnswerText, wanted: frozenset[str], *, in_pieces: bool
    ) -> None:
        self._sender = sender
        self._wanted = wanted
        self._generation = generation
        self._answer = answer
        self._in_pieces = in_pieces
        self._unsent: list[int] = []
        self._unsent_piece = Piece()

    @property
    def has_ended(self) -> bool:
        """Whether a stop text ended the answer: the scheduler does not read it."""
        return self._answer.is_cut

    def prepend_prompt(self) -> None:
        """Let the first response begin with the prompt's ids, as the C++ backend does by default."""
        self._unsent.extend(self._generation.prompt)

    def progress(self, step: Progress) -> None:
        """Send what is due."""
        self._unsent.extend(step.new_ids)
        self._unsent_piece = self._unsent_piece.joined(self._answer.piece(step.new_ids))
        is_final = step.is_final or self.has_ended
        if not (self._in_pieces or is_final):
            return
        response = backend.numpy_response(self._outputs(), self._wanted)
        self._unsent.clear()
        self._unsent_piece = Piece()
        if is_final:
            backend.send_last(self._sender, response)
        else:
            self._sender.send(response)

    def fail(self, problem: Exception) -> None:
        """Send the error as the last response."""
        backend.send_last(self._sender, backend.error_response(problem))

    def is_cancelled(self) -> bool:
        """Ask Triton whether the client went away. Never after the last response: tritonserver 2.51 dies of it."""
        return bool(self._sender.is_cancelled())

    def _outputs(self) -> dict[str, NDArray[Any]]:
        """The count is of this response's tokens, as the C++ backend's is (its fillTritonResponse)."""
        piece, generation = self._unsent_piece, self._generation
        return {
            **decoder_outputs(self._unsent, input_tokens=len(generation.prompt), output_tokens=piece.tokens),
            **backend.text_outputs(piece.text, piece.finish_reason, generation.key),
        }


def decoder_outputs(ids: list[int], *, input_tokens: int, output_tokens: int) -> dict[str, NDArray[Any]]:
    """Return the outputs of contract C.3 that are made, for one beam of one request."""
    return {
        tensors.OUTPUT_IDS.name: np.array([[ids]], dtype=np.int32),
        tensors.SEQUENCE_LENGTH.name: np.array([[len(ids)]], dtype=np.int32),
        tensors.INPUT_TOKEN_COUNT.name: np.array([[input_tokens]], dtype=np.int32),
        tensors.OUTPUT_TOKEN_COUNT.name: np.array([[output_tokens]], dtype=np.int32),
    }


def empty_response(wanted: frozenset[str]) -> Any:
    """An answer of no tokens."""
    outputs = {**decoder_outputs([], input_tokens=0, output_tokens=0), **backend.text_outputs("", "", 0)}
    return backend.numpy_response(outputs, wanted)


def engine_from_settings(settings: ServingSettings) -> ReferenceEngine:
    """The decoder and its KV cache, as config.pbtxt says."""
    decoder = decoder_from_trtllm(settings.folder, torch_type(settings, "compute_dtype", _COMPUTE_TYPES))
    cache = SlottedKvCache(
        decoder.spec,
        slots=settings.integer("max_batch_size"),
        max_seq_len=settings.integer("max_seq_len"),
        dtype=torch_type(settings, "kv_cache_dtype", _KV_CACHE_TYPES),
    )
    engine = ReferenceEngine(fused(decoder), cache)
    engine.warm_up()
    return engine


def torch_type(settings: ServingSettings, key: str, known: Mapping[str, torch.dtype]) -> torch.dtype:
    """The element type a parameter names; NvlmError for any but the known ones."""
    if settings.text(key) not in known:
        raise NvlmError(f"parameter {key} is {settings.text(key)!r}, expected one of {', '.join(known)}")
    return known[settings.text(key)]


def sampling_settings(request: Any) -> SamplingSettings:
    """The request's sampling inputs; those left out keep TensorRT-LLM's defaults."""
    given = {field: backend.scalar(request, _SPECS[name]) for name, field in _SAMPLING.items()}
    return SamplingSettings(**{field: value for field, value in given.items() if value is not None})


def refuse_unsupported(request: Any) -> None:
    """NvlmError naming an input that this decoder cannot honour."""
    for tensor in request.inputs():
        name = tensor.name()
        if name in _HONOURED or name in _WITHOUT_EFFECT:
            continue
        if name not in _ONLY_VALUE:
            raise NvlmError(f"input {name} is not supported by the reference decoder", hint=f"leave {name} out")
        value = backend.scalar(request, _SPECS[name])
        if value != _ONLY_VALUE[name]:
            raise NvlmError(f"{name} is {value}; the reference decoder knows {name} {_ONLY_VALUE[name]} only")


def require_fits(prompt_tokens: int, max_tokens: int, max_seq_len: int) -> None:
    """NvlmError when the answer would not fit behind the prompt in the KV cache."""
    if max_tokens < 1:
        raise NvlmError(f"request_output_len is {max_tokens}, expected at least 1")
    if prompt_tokens + max_tokens > max_seq_len:
        raise NvlmError(
            f"{prompt_tokens} prompt tokens and request_output_len {max_tokens} exceed max_seq_len {max_seq_len}"
        )


def _is_set(request: Any, spec: tensors.TensorSpec) -> bool:
    return bool(backend.scalar(request, spec))
