"""The reference decoder's tokens a second against transformers' `generate`: same weights, threads and element type.

    python tests/bench/bench_decoder.py
    python tests/bench/bench_decoder.py --device cuda     FP8 tensor cores, recorded decoding steps: not run yet

Ours is what serves: the scheduler on its slotted cache, reading a TensorRT-LLM checkpoint. Theirs is Qwen2ForCausalLM,
one batch of all prompts. Rounds are interleaved, medians are judged. FP8 rows stand beside them without a bar.
Prints a table and, as its last line, one JSON object. Exit code 1 when a bar does not hold.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from synthetic import released_config

from nvlm_deploy.checkpoint.reader import Checkpoint
from nvlm_deploy.checkpoint.writer import write_shards
from nvlm_deploy.llm.calibrate import calibrate
from nvlm_deploy.llm.trtllm import trtllm_checkpoint_from
from nvlm_deploy.model.decoder import PREFIX, Decoder
from nvlm_deploy.model.fused import fused
from nvlm_deploy.model.reference import decoder_from_trtllm
from nvlm_deploy.model.spec import DecoderSpec, ModelSpec, spec_from_config
from nvlm_deploy.report.device import device_name
from nvlm_deploy.report.measurement import Bar, Measurement, Verdict, all_hold
from nvlm_deploy.report.tables import verdict_table
from nvlm_deploy.serving.kv_cache import SlottedKvCache
from nvlm_deploy.serving.reference import ReferenceEngine
from nvlm_deploy.serving.scheduler import Generation, Progress, Scheduler

THREADS = 2
PROMPT_TOKENS, NEW_TOKENS = 64, 64
CONCURRENT = 8
ROUNDS = 5
LEAST_GAIN = 3.0
SIZES = {
    "small": {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 4, "vocab_size": 512}
    | {"num_attention_heads": 8, "num_key_value_heads": 2},
    "wider": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 8, "vocab_size": 16384}
    | {"num_attention_heads": 16, "num_key_value_heads": 2},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# prompts, one per sequence -> ids generated after each
Generate = Callable[[list[list[int]]], list[list[int]]]


@dataclass
class Answer:
    """A Sink that keeps the ids."""

    done: threading.Event = field(default_factory=threading.Event)
    ids: list[int] = field(default_factory=list)
    problem: Exception | None = None

    def progress(self, step: Progress) -> None:
        self.ids.extend(step.new_ids)
        if step.is_final:
            self.done.set()

    def fail(self, problem: Exception) -> None:
        self.problem = problem
        self.done.set()

    def is_cancelled(self) -> bool:
        return False


def ours(decoder: Decoder, dtype: torch.dtype, device: str) -> Generate:
    """Through the scheduler, as it serves."""
    most_tokens = PROMPT_TOKENS + NEW_TOKENS
    cache = SlottedKvCache(decoder.spec, slots=CONCURRENT, max_seq_len=most_tokens, dtype=dtype, device=device)
    engine = ReferenceEngine(fused(decoder.to(device)), cache)
    engine.warm_up()
    scheduler = Scheduler(engine, max_waiting=CONCURRENT)
    scheduler.start()

    def generate(prompts: list[list[int]]) -> list[list[int]]:
        answers = [Answer() for _ in prompts]
        for prompt, answer in zip(prompts, answers, strict=True):
            scheduler.submit(Generation(tuple(prompt), NEW_TOKENS, end_id=-1), answer)
        for answer in answers:
            answer.done.wait()
            if answer.problem is not None:
                raise answer.problem
        return [answer.ids for answer in answers]

    return generate


def theirs(spec: DecoderSpec, weights: dict[str, torch.Tensor], dtype: torch.dtype, device: str) -> Generate:
    """transformers, greedy, with its own cache."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        rms_norm_eps=spec.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rotary_base},
        max_position_embeddings=spec.max_positions,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model: Any = Qwen2ForCausalLM(config)
    model.load_state_dict(weights)
    model.to(device, dtype).eval().requires_grad_(False)

    @torch.inference_mode()
    def generate(prompts: list[list[int]]) -> list[list[int]]:
        ids = torch.tensor(prompts, device=device)
        mask = torch.ones_like(ids)
        found = model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS
        )
        tokens: list[list[int]] = found[:, ids.shape[1] :].tolist()
        return tokens

    return generate


def random_weights(spec: DecoderSpec) -> dict[str, torch.Tensor]:
    """BF16, by Hugging Face's names; of a size that keeps activations near one."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Decoder(spec).state_dict().items()}
    return {
        name: (torch.randn(shape, generator=generator) * shape[-1] ** -0.5 + ("norm" in name)).bfloat16()
        for name, shape in shapes.items()
    }


def written(folder: Path, size: dict[str, int]) -> tuple[Checkpoint, ModelSpec]:
    config = released_config()
    config["llm_config"] |= {**size, "eos_token_id": 1, "bos_token_id": 0}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    spec = spec_from_config(config)
    weights = random_weights(spec.decoder)
    write_shards(folder, ((PREFIX + name, weight) for name, weight in weights.items()), max_shard_bytes=1 << 30)
    return Checkpoint.open(folder), spec


def contestants(folder: Path, size: dict[str, int], device: str) -> dict[str, Generate]:
    """Who runs, by name; the decoders come from checkpoints written on disk."""
    checkpoint, spec = written(folder / "hf", size)
    table = checkpoint.tensor(f"{PREFIX}model.embed_tokens.weight").float()
    calibration = calibrate(checkpoint, spec, [table[torch.arange(PROMPT_TOKENS) * 7 % len(table)]])
    plain = trtllm_checkpoint_from(checkpoint, spec, folder / "bf16", calibration=None)
    fp8 = trtllm_checkpoint_from(checkpoint, spec, folder / "fp8", calibration=calibration)
    runners = {}
    for name, dtype in DTYPES.items():
        runners[f"transformers {name}"] = theirs(spec.decoder, checkpoint.tensors(PREFIX), dtype, device)
        runners[f"ours {name}"] = ours(decoder_from_trtllm(plain, dtype), dtype, device)
        runners[f"ours FP8, {name}"] = ours(decoder_from_trtllm(fp8, dtype), dtype, device)
    return runners


def tokens_per_second(runners: dict[str, Generate], vocab_size: int) -> dict[tuple[str, int], list[float]]:
    """By contestant and concurrency, one value a round; all take turns in every round, after one that is not kept."""
    draw = torch.Generator().manual_seed(1)
    found: dict[tuple[str, int], list[float]] = {}
    for round_number in range(ROUNDS + 1):
        prompts = torch.randint(2, vocab_size, (CONCURRENT, PROMPT_TOKENS), generator=draw).tolist()
        for together in (1, CONCURRENT):
            for name, generate in runners.items():
                start = time.perf_counter()
                answers = generate(prompts[:together])
                seconds = time.perf_counter() - start
                if [len(answer) for answer in answers] != [NEW_TOKENS] * together:
                    raise RuntimeError(f"{name} did not generate {NEW_TOKENS} tokens for each of {together}")
                if round_number:
                    found.setdefault((name, together), []).append(together * NEW_TOKENS / seconds)
    return found


def judged(size: str, found: dict[tuple[str, int], list[float]]) -> list[Verdict]:
    """Ratios within a round, so that what else the machine does falls on both sides; their median."""
    verdicts = []
    for dtype in DTYPES:
        for together in (1, CONCURRENT):
            name = f"{size} {dtype}, {together} concurrent: ours over transformers"
            verdicts.append(_ratio(name, found, (f"ours {dtype}", together), (f"transformers {dtype}", together), 1.0))
        name = f"{size} {dtype}: {CONCURRENT} concurrent over one"
        verdicts.append(_ratio(name, found, (f"ours {dtype}", CONCURRENT), (f"ours {dtype}", 1), LEAST_GAIN))
    return verdicts


def _ratio(
    name: str, found: dict[tuple[str, int], list[float]], over: tuple[str, int], under: tuple[str, int], bound: float
) -> Verdict:
    ratios = [one / other for one, other in zip(found[over], found[under], strict=True)]
    return Verdict(Measurement(name, median(ratios), "", ROUNDS), Bar("at least", bound))


def table_of(size: str, found: dict[tuple[str, int], list[float]]) -> Table:
    title = f"{size}: {', '.join(f'{value} {key}' for key, value in SIZES[size].items())}"
    table = Table("tokens/s, median (least - most)", box=box.SIMPLE_HEAD, pad_edge=False, title=title)
    for together in (1, CONCURRENT):
        table.add_column(f"{together} concurrent", justify="right")
    for name in dict.fromkeys(name for name, _ in found):
        rates = [found[name, together] for together in (1, CONCURRENT)]
        table.add_row(name, *(f"{median(rate):.0f} ({min(rate):.0f} - {max(rate):.0f})" for rate in rates))
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    device = parser.parse_args().device
    torch.set_num_threads(THREADS)
    console, verdicts, results = Console(highlight=False), [], {}
    print(f"{PROMPT_TOKENS} prompt tokens, {NEW_TOKENS} generated; {THREADS} threads; {ROUNDS} rounds")
    for size, numbers in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            found = tokens_per_second(contestants(Path(folder), numbers, device), numbers["vocab_size"])
        console.print(table_of(size, found))
        verdicts += judged(size, found)
        results[size] = {f"{name}, {together}": median(rates) for (name, together), rates in found.items()}
    console.print(verdict_table(verdicts))
    bars = [verdict.as_json() for verdict in verdicts]
    print(json.dumps({"name": "decoder", "device": device_name(), "results": results, "bars": bars}))
    return 0 if all_hold(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
