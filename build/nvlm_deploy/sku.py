"""Sku: facts of the hardware that we are told by its maker (engines/skus/*.toml). What we choose is in profiles."""

from __future__ import annotations

import tomllib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nvlm_deploy.errors import NvlmError

# the first compute capability whose tensor cores multiply this type (CUDA C++ Programming Guide, "Tensor Cores")
FIRST_WITH_BF16 = (8, 0)
FIRST_WITH_FP8 = (8, 9)


class Sku(BaseModel):
    """One kind of GPU, or none. `source` says where the facts come from."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    description: str
    source: str
    compute_capability: str | None = Field(default=None, pattern=r"^[0-9]+\.[0-9]$")

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
        raise NvlmError(f"no SKU {name!r}", hint=f"there are: {', '.join(sku_names())}")
    path = sku_folder() / f"{name}.toml"
    try:
        return Sku.model_validate({"name": name, **tomllib.loads(path.read_text(encoding="utf-8"))})
    except tomllib.TOMLDecodeError as problem:
        raise NvlmError(f"{path} is not TOML: {problem}") from problem
    except ValidationError as problem:
        errors = (f"{'.'.join(map(str, error['loc']))}: {error['msg'].lower()}" for error in problem.errors())
        raise NvlmError(f"{path}: {'; '.join(errors)}") from None
