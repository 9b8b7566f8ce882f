"""A fake of TensorRT-LLM's Triton backend (see ../../README.md): Triton loads it by the backend's name.

It asks of config.pbtxt and of every request what the C++ one asks, and answers with the prompt's own ids, without end
ids: TensorRT-LLM ends at one and does not count it as output.
"""

import json
import os
from pathlib import Path

import numpy as np
import torch
import triton_python_backend_utils as utils

LEAST_PARAMETERS = ("guided_decoding_backend", "tokenizer_dir", "xgrammar_tokenizer_info_path")
BATCHING = ("V1", "v1", "inflight_batching", "inflight_fused_batching")
FINAL = utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        self.parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        for name in LEAST_PARAMETERS:  # GetParameter without a try: what is missing ends the load
            if name not in self.parameters:
                raise utils.TritonModelException(f"Cannot find parameter with name: {name}")
        if self.parameters["gpt_model_type"] not in BATCHING:
            raise utils.TritonModelException("Invalid gpt_model_type")
        engines = Path(self.parameters["gpt_model_path"])  # std::filesystem::exists: from the working folder
        if not engines.exists():
            raise utils.TritonModelException("Both encoder and decoder model paths are empty")
        engine = json.loads((engines / "config.json").read_text())
        self.build, self.model = engine["build_config"], engine["pretrained_config"]
        world = int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1"))
        if world != self.model["mapping"]["world_size"]:
            raise utils.TritonModelException("MPI worldSize is expected to be equal to tp*pp when")
        for rank in range(world):
            (engines / f"rank{rank}.engine").read_bytes()
        self.excludes_input = flag(self.parameters["exclude_input_in_output"])
        print(f"[fake tensorrtllm] {engines} at {Path.cwd()}: {sorted(self.parameters)}", flush=True)

    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            try:
                self.answer(request, sender)
            except Exception as problem:
                error = utils.TritonError(f"{type(problem).__name__}: {problem}")
                sender.send(utils.InferenceResponse(error=error), flags=FINAL)

    def answer(self, request, sender):
        given = {tensor.name(): tensor for tensor in request.inputs()}
        if "stop" in given and given["stop"].as_numpy().reshape(-1)[0]:
            sender.send(flags=FINAL)
            return
        ids = given["input_ids"].as_numpy()
        require(ids.ndim == 2 and len(ids) == 1, f"Expected inputTokens tensors to have 2 dimensions: {ids.shape}")
        for name in ("input_lengths", "request_output_len", "end_id", "streaming", "prompt_vocab_size", "seed"):
            if name in given:
                require(
                    given[name].shape() == [1], f"{name} has shape {given[name].shape()}, extractSingleton wants one"
                )
        count = int(given["input_lengths"].as_numpy()[0])
        require(ids.shape[1] == count, f"{ids.shape[1]} ids, input_lengths {count}")
        self.require_table(given, ids)
        length = int(given["request_output_len"].as_numpy()[0])
        require(count + length <= self.build["max_seq_len"], "prompt and output exceed max_seq_len of the engine")
        end = int(given["end_id"].as_numpy()[0])
        text = [int(one) for one in ids[0] if one < self.model["vocab_size"] and one != end]
        pieces = [[token] for token in text[:length]]
        if not given["streaming"].as_numpy()[0]:
            pieces = [[token for piece in pieces for token in piece]]
        self.send(sender, pieces, count)

    def require_table(self, given, ids):
        """promptTuningBuffers.cpp: [1, N, hidden] with N == prompt_vocab_size, within a request's share, in BF16."""
        table = torch.from_dlpack(given["prompt_embedding_table"].to_dlpack())
        rows = int(given["prompt_vocab_size"].as_numpy()[0])
        share = self.build["max_prompt_embedding_table_size"] // self.build["max_batch_size"]
        require(table.dtype == torch.bfloat16, f"table of {table.dtype}")
        require(tuple(table.shape) == (1, rows, self.model["hidden_size"]), f"table of {tuple(table.shape)}")
        require(rows <= share, f"{rows} rows, a request's share of the table is {share}")
        require(int(ids.max()) < self.model["vocab_size"] + rows, "a visual id beyond the table")
        extra = given["prompt_table_extra_ids"].as_numpy()
        require(extra.shape == ids.shape, f"extra ids {extra.shape} for ids {ids.shape}: would be ignored")
        require(bool(((extra > 0) == (ids >= self.model["vocab_size"])).all()), "extra ids are for visual ids alone")

    def send(self, sender, pieces, count):
        """num_output_tokens counts the tokens of its own response (fillTritonResponse)."""
        for number, piece in enumerate(pieces):
            outputs = {
                "output_ids": [[piece]],
                "sequence_length": [[len(piece)]],
                "num_input_tokens": [[count]],
                "num_output_tokens": [[len(piece)]],
            }
            tensors = [utils.Tensor(name, np.array(value, dtype=np.int32)) for name, value in outputs.items()]
            sender.send(utils.InferenceResponse(tensors), flags=FINAL if number == len(pieces) - 1 else 0)


def flag(text):
    if text not in ("True", "true", "TRUE", "1", "False", "false", "FALSE", "0"):
        raise utils.TritonModelException(f"Cannot convert {text} to a boolean.")
    return text.lower() in ("true", "1")


def require(holds, words):
    if not holds:
        raise ValueError(words)
