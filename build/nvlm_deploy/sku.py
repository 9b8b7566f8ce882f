"""Sku: facts of the hardware that we are told by its maker (engines/skus/*.toml). What we choose is in profiles."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from nvlm_deploy.errors import NvlmError, unknown_name

# the first compute capability whose tensor cores multiply this type (CUDA C++ Programming Guide, "Tensor Cores")
FIRST_WITH_BF16 = (8, 0)
FIRST_WITH_FP8 = (8, 9)

RuntimeName = Literal["onnxruntime", "reference", "tensorrt", "tensorrt_llm", "tensorrt_rtx"]
ONNX_RUNTIME, REFERENCE = "onnxruntime", "reference"
TENSORRT, TENSORRT_LLM, TENSORRT_RTX = "tensorrt", "tensorrt_llm", "tensorrt_rtx"
DataType = Literal["bf16", "fp16", "fp8"]


class _Facts(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Interconnect(_Facts):
    """How GPUs of one server talk: `gb_s` (10^9 bytes) counts both directions of one GPU, as data sheets do.

    `gpus` are joined at that speed; more of them talk over PCIe.
    """

    kind: Literal["nvlink", "pcie"]
    gb_s: PositiveFloat
    gpus: PositiveInt


class Sku(_Facts):
    """One kind of GPU, or none. `sources` names, for each fact that is stated, where it comes from.

    `visible_gib` is what CUDA reports as total, less than the number in the product's name; `dense_tflops` are rates
    without sparsity, and their keys the data types that the tensor cores multiply; `gpu_names` are the driver's names.
    `price_usd_per_hour` is one provider's price of one day, there to put profiles in an order.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    description: str
    sources: dict[str, str] = Field(min_length=1)
    compute_capability: str | None = Field(default=None, pattern=r"^[0-9]+\.[0-9]$")
    gpu_names: tuple[str, ...] = Field(default=(), strict=False)
    visible_gib: PositiveFloat | None = None
    bandwidth_gb_s: PositiveFloat | None = None
    dense_tflops: dict[DataType, PositiveFloat] = Field(default_factory=dict)
    interconnect: Interconnect | None = None
    gpus_per_server: PositiveInt | None = None
    runtimes: tuple[RuntimeName, ...] = Field(default=(), strict=False)
    price_usd_per_hour: PositiveFloat | None = None

    @model_validator(mode="after")
    def _each_fact_has_a_source(self) -> Sku:
        stated = {name for name in self.model_fields_set if getattr(self, name)} - {"name", "description", "sources"}
        for kind, names in (("no source for", stated - set(self.sources)), ("source of", set(self.sources) - stated)):
            if names:
                raise ValueError(f"{kind} {', '.join(sorted(names))}")
        return self

    @model_validator(mode="after")
    def _data_types_are_those_of_the_capability(self) -> Sku:
        for kind, able in (("bf16", self.has_bf16), ("fp8", self.has_fp8)):
            if self.dense_tflops and (kind in self.dense_tflops) != able:
                raise ValueError(f"dense_tflops and compute_capability {self.compute_capability} disagree on {kind}")
        return self

    @property
    def capability(self) -> tuple[int, int]:
        """The compute capability in a form that compares; (0, 0) where there is no GPU."""
        major, minor = (self.compute_capability or "0.0").split(".")
        return int(major), int(minor)

    @property
    def has_bf16(self) -> bool:
        return self.capability >= FIRST_WITH_BF16

    @property
    def has_fp8(self) -> bool:
        return self.capability >= FIRST_WITH_FP8

    @property
    def build_facts(self) -> dict[str, str | None]:
        """What an engine depends on: a corrected price or bandwidth makes no engine another one."""
        return {"name": self.name, "compute_capability": self.compute_capability}

    @property
    def visible_bytes(self) -> int:
        """Memory of one GPU; 0 where there is none."""
        return int((self.visible_gib or 0) * 2**30)

    def is_gpu(self, driver_name: str, compute_capability: str) -> bool:
        """Whether the driver calls a GPU of this kind so."""
        return compute_capability == self.compute_capability and driver_name in self.gpu_names


def sku_folder() -> Path:
    """The SKUs shipped with the package: beside it in a checkout, inside it in a wheel."""
    here = Path(__file__).resolve().parent
    shipped = here / "data" / "skus"
    return shipped if shipped.is_dir() else here.parents[1] / "engines" / "skus"


def sku_names() -> list[str]:
    return sorted(file.stem for file in sku_folder().glob("*.toml"))


def load_sku(name: str) -> Sku:
    """The shipped facts of one SKU. Raises NvlmError for an unknown name or a file that does not state them."""
    if name not in sku_names():
        raise unknown_name("SKU", name, sku_names())
    path = sku_folder() / f"{name}.toml"
    try:
        return Sku.model_validate({"name": name, **tomllib.loads(path.read_text(encoding="utf-8"))})
    except tomllib.TOMLDecodeError as problem:
        raise NvlmError(f"{path} is not TOML: {problem}") from problem
    except ValidationError as problem:
        errors = (
            f"{'.'.join(map(str, error['loc'])) or 'facts'}: {error['msg'].lower()}" for error in problem.errors()
        )
        raise NvlmError(f"{path}: {'; '.join(errors)}") from None
