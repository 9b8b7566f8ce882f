"""Pictures over HTTP: the `generate` endpoints of the real server, asked with the curl lines of the documentation."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
from pathlib import Path

import pytest
from PIL import Image

pytestmark = pytest.mark.slow

QUESTION = "What is 12 plus 7?"
# as in the documentation, with $URL for http://127.0.0.1:8000 and $IMAGE for a file
ONE = """
curl -sN "$URL/v2/models/nvlm/{verb}" -d @- <<END
{{"text_input": "What is 12 plus 7?", "max_tokens": 8, "image": "$(base64 -w0 "$IMAGE")", "stream": {stream}}}
END
"""
TWO = """
curl -sN "$URL/v2/models/nvlm/{verb}" -d @- <<END
{{"text_input": "What is 12 plus 7?", "max_tokens": 8,
  "image": ["data:image/png;base64,$(base64 -w0 "$IMAGE")", "$(base64 -w0 "$IMAGE")"], "stream": {stream}}}
END
"""


@pytest.fixture(scope="module")
def ask(server, picture, tmp_path_factory):
    """Runs a curl line in bash; returns the JSON documents of its answer."""
    image = tmp_path_factory.mktemp("http") / "page 1.png"
    image.write_bytes(picture())
    environment = {
        "URL": f"http://127.0.0.1:{server.choices.ports.http}",
        "IMAGE": str(image),
        "PATH": "/usr/bin:/bin",
        "no_proxy": "*",
    }

    def run(script: str) -> list[dict[str, object]]:
        done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, timeout=120, check=True)
        text = done.stdout.decode()  # random weights answer with any tokens: their text is UTF-8 all the same
        lines = [line.removeprefix("data: ") for line in text.split("\n") if line.strip()]
        return [json.loads(line) for line in lines]

    return run


def body(**values: object) -> str:
    """A curl line that sends a document as it is."""
    document = json.dumps({"text_input": QUESTION, "max_tokens": 4, "stream": False, **values})
    return f"curl -sN \"$URL/v2/models/nvlm/generate\" -d @- <<'END'\n{document}\nEND\n"


def text_of(answers: list[dict[str, object]]) -> str:
    return "".join(str(answer["text_output"]) for answer in answers)


def error_of(answers: list[dict[str, object]]) -> str:
    (answer,) = answers
    return str(answer["error"])


@pytest.mark.parametrize(("script", "images"), [(ONE, 1), (TWO, 2)], ids=["one picture", "two pictures"])
@pytest.mark.parametrize(("verb", "stream"), [("generate", "false"), ("generate_stream", "true")])
def test_pictures_in_base64_are_answered_as_over_grpc(ask, caller, picture, script, images, verb, stream):
    answers = ask(script.format(verb=verb, stream=stream))
    expected = caller.ask(QUESTION, image=[picture()] * images, request_id="", max_tokens=8, stream=False)
    assert text_of(answers).encode(errors="surrogateescape") == b"".join(expected.pieces)
    assert answers[0]["num_input_tokens"] == expected.input_tokens
    assert len(answers) == (1 if verb == "generate" else 8)


def test_a_picture_in_lines_of_url_safe_base64_is_the_same_picture(ask, picture):
    standard = base64.b64encode(picture()).decode()
    lines = "\n".join(base64.urlsafe_b64encode(picture())[i : i + 76].decode() for i in range(0, len(standard), 76))
    assert ask(body(image=lines.rstrip("="))) == ask(body(image=standard))
    assert ask(body(image=[standard])) == ask(body(image=standard))


def test_no_picture_is_a_question_alone(ask):
    assert ask(body(image=[])) == ask(body())


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("https://example.com/cat.png", "image 1 of 1: the image is a https:// URL; nothing is fetched"),
        ("iVBORw0KGgoAAA*", "image 1 of 1: the image is broken base64: '*' at position 15"),
        (["iVBORw0KGgo=", "no picture!"], "image 2 of 2: not an image"),
        ("data:image/svg+xml,%3Csvg%3E", "a data URL that is not in base64"),
    ],
)
def test_what_is_no_picture_is_said_in_the_error(ask, image, words):
    assert words in error_of(ask(body(image=image)))


def test_a_phone_photograph_fits_in_a_request(ask, tmp_path):
    noise = Image.effect_noise((4032, 3024), 60).convert("RGB")
    noise.save(tmp_path / "photo.jpg", quality=90)
    script = ONE.format(verb="generate", stream="false").replace("$IMAGE", str(tmp_path / "photo.jpg"))
    assert "text_output" in ask(script)[0]


def test_a_body_of_64_megabytes_is_refused_and_not_the_end_of_the_server(ask, tmp_path):
    """Triton copies a body onto a thread's stack: at its usual 8 MB the server died of signal 11."""
    document = {"text_input": QUESTION, "image": "A" * 64_000_000, "stream": False}
    (tmp_path / "body.json").write_text(json.dumps(document))
    script = f'curl -sN "$URL/v2/models/nvlm/generate" -d "@{tmp_path}/body.json"'
    assert "the image has 48,000,000 bytes, the limit is 33,554,432" in error_of(ask(script))
    assert "text_output" in ask(body())[0]


def test_an_alpha_plane_and_its_flattened_picture_have_one_answer(ask):
    """What the served model sees is what a viewer shows."""
    ink = Image.effect_noise((112, 56), 90)
    hidden = Image.merge("LA", (Image.new("L", ink.size), ink.point(lambda grey: 255 - grey)))
    found = [ask(body(image=base64.b64encode(png(image)).decode())) for image in (hidden, ink)]
    assert found[0] == found[1]


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


DOCUMENTATION = Path(__file__).parents[2] / "docs" / "serving.md"


def test_the_curl_lines_of_the_documentation_run_as_they_stand(server) -> None:
    section = DOCUMENTATION.read_text().partition("## Over HTTP")[2].partition("\n## ")[0]
    lines = [line[4:] for line in section.splitlines() if line.startswith("    ")]
    script = "\n".join(["set -e", *lines]).replace("localhost:8000", f"127.0.0.1:{server.choices.ports.http}")
    assert script.count("curl") == 3
    environment = {"PATH": "/usr/bin:/bin", "no_proxy": "*"}
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=DOCUMENTATION.parents[1],
        env=environment,
        capture_output=True,
        timeout=120,
        check=True,
    )
    answers = [json.loads(part) for part in re.findall(r"\{.*?\}", done.stdout.decode())]
    assert len(answers) > 3
    assert not [answer for answer in answers if "error" in answer]


@pytest.mark.parametrize("empty", ['""', "[]", '[""]'])
def test_an_empty_text_option_is_left_out(ask, empty) -> None:
    plain = text_of(ask(body()))
    for name in ("stop_words", "bad_words", "image"):
        assert text_of(ask(body(**{name: json.loads(empty)}))) == plain


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("max_token", "max_tokens"), ("random_seed", "seed"), ("min_length", "min_tokens"), ("beam_width", "leave it out"),
     ("timeout", "leave it out"), ("priority", "leave it out"), ("max_new_tokens", "max_tokens")],
)  # fmt: skip
def test_an_option_that_would_not_be_honoured_is_refused_with_the_nearest_one(ask, name, nearest) -> None:
    (answer,) = ask(body(**{name: 5}))
    assert f"option {name} is not known" in str(answer["error"])
    assert nearest in str(answer["error"])
