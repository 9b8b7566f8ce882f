"""The rooms may only import downwards; checked on the source text, so that lazy imports count too."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
ROOTS = [REPOSITORY / root / "nvlm_deploy" for root in ("build", "triton_repo", "tools")]

# a room may import rooms of lower rank, and itself; vision, llm and serving share a rank: never each other
RANK = {
    "errors": 0,
    "progress": 0,
    "scratch": 1,
    "places": 0.5,  # knows errors alone, and is asked by what reads any file
    "digest": 0,
    "tensors": 1,
    "image_file": 1,
    "profile": 2,
    "sku": 1,
    "samples": 1,
    "manifest": 1,
    "artifacts": 2,
    "build_lock": 2,
    "container": 2,
    "machine": 2,
    "signature": 3,
    "slots": 3,
    "fingerprint": 3,
    "checkpoint": 3,
    "model": 3,
    "verification": 4,
    "vision": 4,
    "llm": 4,
    "serving": 4,
    "triton": 5,
    "pipeline": 5,
    "sample_embeddings": 5,
    "recipe": 6,
    "workspace": 6,
    "client": 7,
    "planning": 7,
    "steps": 8,
    "report": 9,
    "doctor": 10,
    "validate": 10,
    "bench": 10,
    "demo": 11,
    "cli": 12,
}
# each of these in at most two files: one place to adapt when its interface changes
RARE_LIBRARIES = (
    "onnx",
    "onnxruntime",
    "tritonclient",
    "tensorrt",
    "tensorrt_llm",
    "tensorrt_rtx",
    "tensorrt_rtx_bindings",
    "polygraphy",
)
# what NVLM-D is and how a checkpoint stores it know each other, file by file and without a cycle
PEERS = {"checkpoint", "model"}
HEAVY = {"torch", "onnx", "onnxruntime", "tritonclient", "transformers", "safetensors", "tokenizers", "pytriton"}


def source_files() -> list[Path]:
    return [path for root in ROOTS for path in sorted(root.rglob("*.py"))]


def room_of(path: Path) -> str:
    root = next(root for root in ROOTS if path.is_relative_to(root))
    return path.relative_to(root).parts[0].removesuffix(".py")


def imports_of(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def imported_rooms(path: Path) -> set[str]:
    names = [name.split(".") for name in imports_of(ast.parse(path.read_text()))]
    return {name[1] for name in names if name[0] == "nvlm_deploy" and len(name) > 1}


@pytest.mark.parametrize("path", source_files(), ids=lambda path: f"{room_of(path)}/{path.name}")
def test_a_room_imports_only_rooms_below_it(path: Path) -> None:
    room = room_of(path)
    others = imported_rooms(path) - (PEERS if room in PEERS else {room})
    upward = {other for other in others if RANK[other] >= RANK[room]}
    assert not upward, f"{room} may not import {upward}"


def test_every_root_is_walked_and_every_room_has_a_rank() -> None:
    assert {room_of(path) for path in source_files()} == set(RANK)


def test_the_namespace_package_has_no_init_and_no_module_hides_a_tool() -> None:
    assert not [root for root in ROOTS if (root / "__init__.py").exists()]
    assert not [path for path in source_files() if path.stem in ("build", "tools") and path.parent.name != "cli"]


def test_backend_libraries_are_imported_in_at_most_two_files_each() -> None:
    users: dict[str, set[Path]] = defaultdict(set)
    for path in source_files():
        for name in imports_of(ast.parse(path.read_text())):
            users[name.split(".")[0]].add(path)
    too_many = {library: users[library] for library in RARE_LIBRARIES if len(users[library]) > 2}
    assert not too_many


@pytest.mark.parametrize("path", [path for path in source_files() if room_of(path) == "cli"], ids=lambda p: p.name)
def test_verbs_load_no_heavy_library_at_import(path: Path) -> None:
    top_level = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {name.split(".")[0] for node in top_level for name in imports_of(node)}
    assert not names & HEAVY
