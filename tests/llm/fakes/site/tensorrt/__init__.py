"""A fake TensorRT: a version and the types of a parameter."""

from __future__ import annotations

import enum
import os

__version__ = os.environ.get("FAKE_TENSORRT_VERSION", "10.14.1.48")


class DataType(enum.Enum):
    FLOAT = 0
    HALF = 1
    BF16 = 9
    FP8 = 10
