"""Profile: what we choose (engines/profiles/*.toml). What the planner can derive is not written down."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from nvlm_deploy.errors import NvlmError, unknown_name
from nvlm_deploy.image_file.limits import MOST_PIXELS, ImageLimits
from nvlm_deploy.image_file.reading import ImageReading, View, colour_of
from nvlm_deploy.places import require_file

# more of anything is a slip of the finger
_MOST = 1_000_000_000
Count = Annotated[int, Field(gt=0, le=_MOST)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class VisionChoice(_Section):
    """How the vision tower runs; the precision is in the ONNX graph. `fp8` is FP8 linears over a BF16 base.

    `max_tiles_per_run` is the most tiles that one run of an engine takes. The numerics gate judges every operation on
    `gate_tiles`, and a small FP8 model's embeddings on more.
    """

    runtime: Literal["onnxruntime", "tensorrt", "tensorrt_rtx"]
    precision: Literal["fp32", "bf16", "fp16", "fp8"]
    weight_scales: Literal["per_tensor", "per_channel"] = "per_channel"
    fp8_attention: bool = False
    max_tiles_per_run: Count = 28
    gate_tiles: Count = 2


class DecoderChoice(_Section):
    """How the decoder runs.

    `fp8` has one static scale a tensor, as ModelOpt's FP8_DEFAULT_CFG; `fp8_per_channel` one a weight's row, with
    activations scaled token by token at run time; `none` keeps BF16 weights. `max_num_tokens` and `build_at_once` are
    for engines: the most tokens of a step and the most ranks built side by side, both derived where they are not given.
    """

    runtime: Literal["reference", "tensorrt_llm"]
    quantization: Literal["fp8", "fp8_per_channel", "none"]
    kv_cache: Literal["16bit", "fp8"] = "16bit"
    tensor_parallel: Count = 1
    pipeline_parallel: Count = 1
    max_batch_size: Count
    max_seq_len: Count
    max_num_tokens: Count | None = None
    build_at_once: Count | None = None

    @property
    def wants_samples(self) -> bool:
        """Whether a scale depends on what reaches the decoder's layers, not on weights alone."""
        return self.quantization == "fp8" or self.kv_cache == "fp8"


def _opaque_colour(name: str) -> str:
    """Itself. Raises ValueError, which pydantic reports with the key, for what is no colour."""
    try:
        colour_of(name)
    except NvlmError as problem:
        raise ValueError(f"{problem.message} ({problem.hint})") from None
    return name


class CalibrationChoice(_Section):
    """How many samples of the calibration list are used; 0 is data-free: scales come from weights alone."""

    samples: Annotated[int, Field(ge=0, le=_MOST)]


class ServingChoice(_Section):
    """What a request may ask for, how its images are read, and how many requests may wait.

    `wrapper` is the chat turn around the question (model/prompt.py). `images` and the limits of an image file are
    explained in image_file/reading.py and limits.py.
    """

    wrapper: Literal["chat", "chat_template", "raw"] = "chat"
    max_images: Count = 16
    default_max_tokens: Count = 128
    images: View = "as_viewed"
    image_background: Annotated[str, AfterValidator(_opaque_colour)] = "white"
    max_image_bytes: Count = ImageLimits().max_image_bytes
    max_image_pixels: Annotated[int, Field(gt=0, le=MOST_PIXELS)] = ImageLimits().max_image_pixels
    max_request_pixels: Count = ImageLimits().max_request_pixels
    max_request_bytes: Count = 128 * 2**20
    max_waiting_requests: Count = 1024
    max_waiting_bytes: Count = 512 * 2**20

    @property
    def image_reading(self) -> ImageReading:
        """How the server reads images, and so calibration too."""
        limits = ImageLimits(self.max_image_bytes, self.max_image_pixels, self.max_request_pixels)
        return ImageReading(self.images, self.image_background, limits)


class Profile(_Section):
    """One way to build and serve the model."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    description: str
    sku: str
    vision: VisionChoice
    decoder: DecoderChoice
    calibration: CalibrationChoice
    serving: ServingChoice = ServingChoice()


def profile_folder() -> Path:
    """The profiles shipped with the package: beside it in a checkout, inside it in a wheel."""
    here = Path(__file__).resolve().parent
    shipped = here / "data" / "profiles"
    return shipped if shipped.is_dir() else here.parents[1] / "engines" / "profiles"


def profile_names() -> list[str]:
    return sorted(file.stem for file in profile_folder().glob("*.toml"))


def load_profile(name_or_path: str) -> Profile:
    """A shipped profile by name, or any profile by the path of its .toml file.

    Raises NvlmError for an unknown name, an unknown key (naming the nearest known one) or a value out of range.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = profile_folder() / f"{name_or_path}.toml"
        if name_or_path not in profile_names():
            raise unknown_name("profile", name_or_path, profile_names())
    require_file(path, "profile file")
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise NvlmError(f"{path} is not TOML: {problem}") from problem
    try:
        return Profile.model_validate({"name": path.stem, **document})
    except ValidationError as problem:
        raise NvlmError(*_explained(path, problem)) from None


def _explained(path: Path, problem: ValidationError) -> tuple[str]:
    return (f"{path}: " + "; ".join(_one_error(dict(error)) for error in problem.errors()),)


def _one_error(error: dict[str, Any]) -> str:
    place = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown key {place!r}{_nearest(error['loc'])}"
    if error["type"] == "missing":
        return f"key {place!r} is missing"
    if error["type"] == "string_pattern_mismatch":
        return f"{place} is {error['input']!r}: expected lower-case letters, digits, . _ -, a letter or digit first"
    return f"{place} is {error['input']!r}: {error['msg'].lower()}"


def _nearest(location: tuple[str, ...]) -> str:
    section: Any = Profile
    for part in location[:-1]:
        section = section.model_fields[part].annotation
    close = difflib.get_close_matches(location[-1], list(section.model_fields), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else f" (there are: {', '.join(section.model_fields)})"
