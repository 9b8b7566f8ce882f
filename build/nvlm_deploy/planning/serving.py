"""What clients will see: time to first token and per token, alone and among others, by stage."""

from __future__ import annotations

from dataclasses import dataclass

from nvlm_deploy.model.spec import ModelSpec
from nvlm_deploy.planning.roofline import SplitDecoder

# decode, two resizes and crops of a 1920x1080 JPEG on one core of an EPYC (tests/bench/bench_preprocess.py)
PREPROCESS_S_PER_IMAGE = 0.048
# prompt tokens around an image's tiles with the released tokenizer: 5 a tile's tag, 4 the image's (facts section 5)
TAG_TOKENS_PER_TILE, TAG_TOKENS_PER_IMAGE = 5, 4
# a queue is not described beyond this share of time taken by prefill
MOST_UTILISATION = 0.95


@dataclass(frozen=True)
class Workload:
    """Requests as clients send them; `input_tokens` are the text's, images add theirs."""

    images: int = 1
    input_tokens: int = 64
    output_tokens: int = 128
    concurrency: int = 1

    def tiles(self, spec: ModelSpec) -> int:
        """The most that the images can become."""
        return self.images * spec.tiling.max_tiles_with_thumbnail

    def prompt_tokens(self, spec: ModelSpec) -> int:
        tile = spec.tiling.tokens_per_tile + TAG_TOKENS_PER_TILE
        return self.input_tokens + self.tiles(spec) * tile + self.images * TAG_TOKENS_PER_IMAGE

    def sequence_tokens(self, spec: ModelSpec) -> int:
        return self.prompt_tokens(spec) + self.output_tokens


def images_in(tokens: int, spec: ModelSpec, tiles: int) -> int:
    """How many images of so many tiles a sequence holds beside one token of text and one of an answer."""
    image = tiles * (spec.tiling.tokens_per_tile + TAG_TOKENS_PER_TILE) + TAG_TOKENS_PER_IMAGE
    return max(0, (tokens - 2) // image)


def fewest_tiles(spec: ModelSpec) -> int:
    """What an image becomes at the least; a lone tile has no thumbnail beside it."""
    tiling = spec.tiling
    return tiling.min_tiles + (1 if tiling.use_thumbnail and tiling.min_tiles > 1 else 0)


@dataclass(frozen=True)
class Demand:
    """One kind of request as the GPUs see it: seconds before the decoder, lengths, and how many are in flight."""

    preprocess_s: float
    vision_s: float
    prompt_tokens: int
    output_tokens: int
    concurrency: int
    most_running: int


@dataclass(frozen=True)
class Prediction:
    """Seconds of one request among others like it; the stages add up to the time to first token."""

    stages: dict[str, float]
    tpot_s: float
    tokens_per_s: float
    running: int

    @property
    def ttft_s(self) -> float:
        return sum(self.stages.values())


def predict(decoder: SplitDecoder, demand: Demand) -> Prediction:
    """Closed loop: each client sends its next request when the last is answered.

    Pipeline stages are counted one after another, also where they would work on different requests: what is said of
    more than one request is then a lower bound. No published row has a pipeline to test another rule with.

    A step of decoding is lengthened by the prompts and pictures of others, spread over the answer's tokens. A new
    prompt waits for the step under way and, as in an M/D/1 queue, for prompts before it; where more clients than can
    run at once ask, also for its turn.
    """
    running = max(1, min(demand.concurrency, demand.most_running))
    prefill_s = decoder.prefill_s(demand.prompt_tokens)
    before_s = demand.vision_s + prefill_s
    step_s = decoder.decode_s(running, demand.prompt_tokens + demand.output_tokens / 2)
    tpot_s = step_s + (running - 1) * before_s / demand.output_tokens
    answer_s = demand.output_tokens * tpot_s
    queue_s = 0.0
    if running > 1:
        busy = min(MOST_UTILISATION, running * before_s / answer_s)
        queue_s = tpot_s + before_s * busy / (2 * (1 - busy))
    queue_s += (demand.concurrency - running) * answer_s / running
    stages = {
        "preprocess": demand.preprocess_s,
        "wait": queue_s,
        "vision": demand.vision_s,
        "prefill": prefill_s,
        "first token": decoder.efficiency.first_token_s,
    }
    # all running requests are done once in the time of their answers, their prompts and pictures
    cycle_s = running * before_s + demand.output_tokens * step_s
    return Prediction(stages, tpot_s, running * demand.output_tokens / cycle_s, running)
