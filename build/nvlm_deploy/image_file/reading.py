"""How image files become pixels: a profile's choices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Literal, cast, get_args

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.image_file.limits import ImageLimits

View = Literal["as_viewed", "reference"]


@dataclass(frozen=True)
class ImageReading:
    """`as_viewed` decodes an image as a viewer shows it: upright, and what is transparent lies on `background`.

    `reference` takes the model card's own steps, `convert("RGB")` alone: EXIF orientation and transparency are ignored.
    `background` is a colour's CSS name or "#rrggbb".
    """

    view: View = "as_viewed"
    background: str = "white"
    limits: ImageLimits = field(default_factory=ImageLimits)

    def __post_init__(self) -> None:
        if self.view not in get_args(View):
            raise NvlmError(f"images is {self.view!r}, expected one of {', '.join(get_args(View))}")
        colour_of(self.background)

    @property
    def colour(self) -> tuple[int, int, int]:
        """The background as red, green and blue."""
        return colour_of(self.background)

    def choices(self) -> dict[str, str]:
        """What decides which pixels the model sees."""
        return {"images": self.view} | ({"image_background": self.background} if self.view == "as_viewed" else {})

    def parameters(self) -> dict[str, object]:
        """The parameters of the model `preprocessing` in Triton's configuration."""
        return {"images": self.view, "image_background": self.background, **asdict(self.limits)}

    @classmethod
    def from_parameters(cls, text: Callable[[str], str], integer: Callable[[str], int]) -> ImageReading:
        """Read what `parameters` wrote, through functions that read one parameter each."""
        limits = ImageLimits(**{name: integer(name) for name in ImageLimits.__dataclass_fields__})
        return cls(cast(View, text("images")), text("image_background"), limits)


def colour_of(name: str) -> tuple[int, int, int]:
    """Return red, green and blue of a CSS colour name or "#rrggbb". Raise NvlmError for anything else."""
    if name == "white":  # without Pillow: most profiles name no other
        return 255, 255, 255
    from PIL import ImageColor

    colour: tuple[int, ...]
    try:
        colour = ImageColor.getrgb(name)
    except ValueError:
        colour = ()
    if len(colour) != 3:  # an unknown name, or a colour with an alpha of its own
        raise NvlmError(f"{name!r} is no opaque colour", hint='name one, as "white", or write "#rrggbb"')
    return colour[0], colour[1], colour[2]
