"""samples.jsonl: what cannot be read is named by line and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvlm_deploy.errors import NvlmError
from nvlm_deploy.samples import SAMPLES_NAME, Sample, read_samples, write_samples

GOOD = '{"question": "How many?", "answer": "3"}'


def folder_with(tmp_path: Path, content: bytes) -> Path:
    (tmp_path / SAMPLES_NAME).write_bytes(content)
    return tmp_path


def test_what_is_written_reads_back_with_absolute_image_paths(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    samples = [
        Sample(question="q", answer="a", task="t", images=(tmp_path / "a.png",)),
        Sample(question="p", answer="b"),
    ]
    write_samples(tmp_path, samples)
    assert read_samples(tmp_path) == samples
    assert read_samples(tmp_path, limit=1) == samples[:1]


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (f"{GOOD}\n\n\nnot json\n".encode(), "line 4: "),
        (b'{"question": "q"}', "line 1: answer: Field required"),
        (b'{"question": "q", "answer": "a", "colour": 1}', "line 1: colour: Extra inputs"),
        (b'{"question": " ", "answer": "a"}', "line 1: the question is empty"),
        (b'{"question": "q", "answer": "a", "images": ["gone.png"]}', "line 1: no image .*gone.png"),
        (b"\xff\xfe", "not UTF-8"),
        (b"\n", "holds no samples"),
    ],
)
def test_a_damaged_list_is_named_by_line_and_key(tmp_path: Path, content: bytes, word: str) -> None:
    with pytest.raises(NvlmError, match=word):
        read_samples(folder_with(tmp_path, content))


def test_a_missing_list_says_what_one_looks_like(tmp_path: Path) -> None:
    with pytest.raises(NvlmError, match=r"no samples\.jsonl") as refusal:
        read_samples(tmp_path)
    assert "question" in (refusal.value.hint or "")


def test_a_byte_order_mark_and_a_line_separator_in_a_string_are_read(tmp_path: Path) -> None:
    content = "\ufeff" + '{"question": "line\u2028sep", "answer": "a"}'
    assert read_samples(folder_with(tmp_path, content.encode()))[0].question == "line\u2028sep"
