"""Triton model `text_decoder`: calls TensorRT-LLM's backend and makes text of its tokens.

It stands between the ensemble and the C++ backend, because the backend names a request by the id that a client chose
and knows neither stop texts nor characters. Here each request gets an id of the server's own, and what belongs to it
ends with it. The reference decoder does the same work itself.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np

from nvlm_deploy import tensors
from nvlm_deploy.serving import backend
from nvlm_deploy.serving.answer_text import AnswerText, Ending, Piece
from nvlm_deploy.serving.settings import TOKENIZER_FILE, ServingSettings
from nvlm_deploy.serving.stopping import StopReceiver
from nvlm_deploy.serving.token_bytes import TokenBytes
from nvlm_deploy.serving.word_list import single_tokens

logger = logging.getLogger(__name__)

DECODER = "tensorrt_llm"
# Triton's python backend has 32 threads a model (its thread-pool-size). A call that waits for its first response holds
# one, and sending a response takes one: were all held by waiting calls, nothing would move.
STARTING = 16
# how long a stop is given before it is sent again: the request may still be on its way to the backend
STOP_AGAIN_S = 0.1
_WANTED = [
    spec.name
    for spec in (
        tensors.OUTPUT_IDS,
        tensors.SEQUENCE_LENGTH,
        tensors.INPUT_TOKEN_COUNT,
        tensors.OUTPUT_TOKEN_COUNT,
    )
]
_OURS = {tensors.STOP_TEXTS.name}


class TritonPythonModel:
    """What Triton calls; decoupled: answers leave from threads."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the tokenizer beside `model.py`."""
        backend.set_up_logging()
        settings = ServingSettings(args)
        self.token_bytes = TokenBytes(settings.folder / TOKENIZER_FILE)
        self.starting = ThreadPoolExecutor(STARTING, thread_name_prefix="starting")
        self.running = ThreadPoolExecutor(settings.integer("max_batch_size") + STARTING, thread_name_prefix="running")
        self.by_key: dict[int, Relayed] = {}
        self.stopping = StopReceiver(self.stop)

    def execute(self, requests: list[Any]) -> None:
        """Queue the requests; returns at once."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                relayed = Relayed(request, sender)
            except Exception as problem:  # a tensor of another size, from a caller that is not the ensemble
                backend.send_last(sender, backend.error_response(problem))
                continue
            self.by_key[relayed.key] = relayed
            self.starting.submit(self._start, relayed)

    def finalize(self) -> None:
        """Triton unloads the model."""
        self.stopping.close()
        for pool in (self.starting, self.running):
            pool.shutdown(wait=False, cancel_futures=True)

    def stop(self, key: int) -> None:
        """End the request of this key; none is fine."""
        relayed = self.by_key.get(key)
        if relayed is not None and not relayed.is_abandoned.is_set():
            relayed.is_abandoned.set()
            self.running.submit(relayed.abandon)

    def _start(self, relayed: Relayed) -> None:
        try:
            responses = relayed.responses()
            answer = AnswerText(self.token_bytes, ending_of(relayed.request))
        except Exception as problem:
            self._end(relayed, problem)
        else:
            self.running.submit(self._relay, relayed, responses, answer)

    def _relay(self, relayed: Relayed, responses: Iterator[Any], answer: AnswerText) -> None:
        try:
            relayed.relay(responses, answer)
        except Exception as problem:
            self._end(relayed, problem)
        else:
            self._end(relayed, None)

    def _end(self, relayed: Relayed, problem: Exception | None) -> None:
        del self.by_key[relayed.key]
        if problem is not None:
            relayed.end(backend.error_response(problem))


class Relayed:
    """One request from its arrival to its last response. `key` is its name here, and to the backend."""

    def __init__(self, request: Any, sender: Any) -> None:
        self.key = secrets.randbits(64)
        self.request = request
        self.is_abandoned = threading.Event()
        self._sender = sender
        self._wanted = backend.wanted_outputs(request)
        self._has_ended = threading.Event()
        self._in_pieces = bool(backend.scalar(request, tensors.STREAMING))
        self._unsent = Piece()
        self._input_tokens = 0

    def responses(self) -> Iterator[Any]:
        """Call the backend with the tensors as they are; returns once the first response is there."""
        inputs = [tensor for tensor in self.request.inputs() if tensor.name() not in _OURS]
        return called(str(self.key), inputs)

    def relay(self, responses: Iterator[Any], answer: AnswerText) -> None:
        """Send the answer's pieces as they come. What comes after its end is read and dropped."""
        for response in responses:
            if self._has_ended.is_set() or self.is_abandoned.is_set():
                continue
            if response.has_error():
                raise backend.error_of_model(response.error().message())
            outputs = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
            if outputs:
                self._input_tokens = int(outputs[tensors.INPUT_TOKEN_COUNT.name].item())
                self._deliver(answer.piece(outputs[tensors.OUTPUT_IDS.name].reshape(-1).tolist()))
            if answer.is_cut:
                self._stop_backend()
        if self.is_abandoned.is_set():
            logger.info("request %d was cancelled after %d tokens", self.key, answer.tokens)
            self.end(backend.cancelled_response())
        elif not self._has_ended.is_set():  # in one piece the backend says nothing of an end id but that it has ended
            self._deliver(answer.piece([]))

    def abandon(self) -> None:
        """Have the backend stop, again and again until it does."""
        while not self._has_ended.wait(STOP_AGAIN_S):
            self._stop_backend()

    def end(self, response: Any) -> None:
        """Send the last response, once."""
        if not self._has_ended.is_set():
            self._has_ended.set()
            backend.send_last(self._sender, response)

    def _deliver(self, piece: Piece) -> None:
        """Send the piece, or keep it where the answer is wanted in one."""
        self._unsent = self._unsent.joined(piece)
        if not (self._in_pieces or piece.finish_reason):
            return
        response = backend.numpy_response(
            {
                **backend.text_outputs(self._unsent.text, self._unsent.finish_reason, self.key),
                tensors.INPUT_TOKEN_COUNT.name: np.array([[self._input_tokens]], dtype=np.int32),
                tensors.OUTPUT_TOKEN_COUNT.name: np.array([[self._unsent.tokens]], dtype=np.int32),
            },
            self._wanted,
        )
        self._unsent = Piece()
        if piece.finish_reason:
            self.end(response)
        else:
            self._sender.send(response)

    def _stop_backend(self) -> None:
        """Send the `stop` of contract C.3: it ends the generation of this id, if there is one."""
        utils = backend.backend_module()
        values = {tensors.INPUT_LENGTHS: [[1]], tensors.REQUEST_OUTPUT_LEN: [[1]], tensors.STOP: [[True]]}
        inputs = [utils.Tensor(spec.name, np.array(value, dtype=spec.dtype)) for spec, value in values.items()]
        for _ in called(str(self.key), inputs):
            pass


def called(request_id: str, inputs: list[Any]) -> Iterator[Any]:
    """Return the backend's responses. All that it makes for a request is asked for, or a stop may find no output."""
    utils = backend.backend_module()
    request = utils.InferenceRequest(
        model_name=DECODER, request_id=request_id, requested_output_names=_WANTED, inputs=inputs
    )
    return cast(Iterator[Any], request.exec(decoupled=True))


def ending_of(request: Any) -> Ending:
    """Return how the answer's text ends: at any end id, and at any stop text."""
    further = single_tokens(backend.words(request, tensors.STOP_WORDS_LIST))
    return Ending(
        end_ids=frozenset({int(backend.scalar(request, tensors.END_ID)), *further}),
        max_tokens=int(backend.scalar(request, tensors.REQUEST_OUTPUT_LEN)),
        stop_words=tuple(word.decode("utf-8") for word in backend.texts(request, tensors.STOP_TEXTS)),
        min_tokens=int(backend.scalar(request, tensors.DECODER_MIN_TOKENS) or 0),
    )
