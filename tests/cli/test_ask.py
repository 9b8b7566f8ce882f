"""`nvlm ask` as a user types it: where no server is, and beside a real gRPC service with chosen answers."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_triton import FakeTriton, Relay
from hypothesis import given
from hypothesis import strategies as st

from nvlm_deploy.cli.ask import with_seconds
from nvlm_deploy.cli.control_characters import for_output, visible
from nvlm_deploy.cli.main import run

# port 9 is discard, on which nothing of ours listens
NOBODY = ["--url", "127.0.0.1:9"]


def exit_code(*arguments: str) -> object:
    with pytest.raises(SystemExit) as ended:
        run(["ask", *arguments])
    return ended.value.code


def test_without_a_server_it_fails_with_3_and_says_how_to_start_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("hello", *NOBODY) == 3
    output = capsys.readouterr()
    assert "no server answers at 127.0.0.1:9" in output.err
    assert "nvlm serve" in output.err
    assert output.out == ""


def test_a_failure_is_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("hello", *NOBODY, "--json") == 3
    problem = json.loads(capsys.readouterr().out)["error"]
    assert problem["exit_code"] == 3
    assert "127.0.0.1:9" in problem["message"]


def test_a_missing_image_is_wrong_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("hello", *NOBODY, "--image", str(tmp_path / "none.png")) == 2
    assert "none.png does not exist" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--seed", "-1"],
        ["--max-tokens", "10000000000"],
        ["--temperature", "nan"],
        ["--top-p", "inf"],
        ["--presence-penalty", "1e300"],
        ["--frequency-penalty", "-inf"],
        ["--min-tokens", "-3000000000"],
        *(
            [option, value]
            for option in ("--timeout", "--wait")
            for value in ("0", "-1", "nan", "inf", "1e300", "1e400")
        ),
    ],
    ids=" ".join,
)
def test_a_number_out_of_range_is_wrong_input(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("hello", *NOBODY, *arguments) == 2
    assert "expected" in capsys.readouterr().err


def test_a_question_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(*NOBODY) == 2
    assert "question" in capsys.readouterr().err


def said_about(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The error without its line breaks."""
    assert exit_code("hello", *arguments) == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("url", "telling"),
    [
        ("http://localhost:8001", "hint: give localhost:8001"),
        ("localhost:99999", "'99999' is not a port"),
        ("localhost", "hint: give localhost:8001"),
        ("::1:8001", "brackets"),
        ("", "address is empty"),
    ],
)
def test_an_address_that_is_none_is_wrong_input(url, telling, capsys) -> None:
    assert telling in said_about(["--url", url], capsys)


@pytest.mark.parametrize("option", ["--stop", "--bad-word"])
@pytest.mark.parametrize("word", ["", b"caf\xe9".decode(errors="surrogateescape")])
def test_a_word_that_is_none_is_wrong_input(option, word, capsys) -> None:
    assert "words is" in said_about([*NOBODY, f"{option}={word}"], capsys)


def test_an_image_from_a_pipe_is_refused_by_name(capsys) -> None:
    reading, writing = os.pipe()
    try:
        assert f"/dev/fd/{reading} is a pipe, not a file" in said_about(
            [*NOBODY, "--image", f"/dev/fd/{reading}"], capsys
        )
    finally:
        os.close(reading)
        os.close(writing)


def test_an_image_on_stdin_is_read_from_a_file_and_refused_from_a_pipe(tmp_path) -> None:
    (tmp_path / "photo.png").write_bytes(b"a photo")
    with FakeTriton() as server:
        command = [*NVLM, "ask", "go", "--url", server.url, "--image", "/dev/stdin"]
        with (tmp_path / "photo.png").open("rb") as photo:
            assert subprocess.run(command, stdin=photo, capture_output=True, timeout=60).stdout == b"19\n"
        piped = subprocess.run(command, input=b"a photo", capture_output=True, timeout=60)
        assert (piped.returncode, b"is a pipe" in piped.stderr) == (2, True)
        assert [request["image"] for request in server.requests] == [[b"a photo"]]


@pytest.mark.parametrize(
    ("image", "telling"),
    [("https://example.com/cat.jpg", "is a URL"), ("", "path is empty"), ("/dev/null", "is a device")],
)
def test_an_image_that_is_none_is_wrong_input_before_any_waiting(image, telling, capsys) -> None:
    started_s = time.monotonic()
    assert telling in said_about([*NOBODY, "--wait", "100", f"--image={image}"], capsys)
    assert time.monotonic() - started_s < 20


# with a server

NVLM = [sys.executable, "-c", "from nvlm_deploy.cli.main import run; run()"]


@pytest.fixture
def triton() -> Iterator[FakeTriton]:
    with FakeTriton() as server:
        yield server


def test_every_option_arrives(triton, capsys) -> None:
    options = [
        "--max-tokens",
        "7",
        "--min-tokens",
        "2",
        "--temperature",
        "0.5",
        "--top-k",
        "3",
        "--top-p",
        "0.25",
        "--repetition-penalty",
        "1.5",
    ]
    more = [
        "--presence-penalty",
        "-0.5",
        "--frequency-penalty",
        "0.75",
        "--seed",
        "11",
        "--stop",
        "a",
        "--stop",
        "b",
        "--bad-word",
        "c",
        "--timeout",
        "30",
    ]
    assert exit_code("go", "--url", triton.url, *options, *more) == 0
    assert capsys.readouterr().out == "19\n"
    assert triton.requests == [
        {
            "text_input": [b"go"],
            "stream": [True],
            "max_tokens": [7],
            "min_tokens": [2],
            "temperature": [0.5],
            "top_k": [3],
            "top_p": [0.25],
            "repetition_penalty": [1.5],
            "presence_penalty": [-0.5],
            "frequency_penalty": [0.75],
            "seed": [11],
            "stop_words": [b"a", b"b"],
            "bad_words": [b"c"],
        }
    ]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--wait", "why?"], ["--wait=300", "why?"]),
        (["why?", "--wait"], ["why?", "--wait=300"]),
        (["--wait", "--json", "why?"], ["--wait=300", "--json", "why?"]),
        (["--wait", "20", "why?"], ["--wait", "20", "why?"]),
        (["--wait", "-1", "why?"], ["--wait", "-1", "why?"]),
        (["--wait=20", "why?"], ["--wait=20", "why?"]),
        (["--", "--wait", "why?"], ["--", "--wait", "why?"]),
        (["--wait", "--", "--wait"], ["--wait=300", "--", "--wait"]),
        (["why?"], ["why?"]),
    ],
)
def test_wait_may_stand_alone(arguments, expected) -> None:
    assert with_seconds(arguments) == expected


@pytest.mark.parametrize("wait", [["--wait"], ["--wait", "30"]])
def test_ask_waits_for_a_server_that_is_still_starting(triton, wait, capsys) -> None:
    with Relay(triton.port) as relay:
        relay.cut()
        threading.Timer(1.5, relay.connect).start()
        assert exit_code(*wait, "go", "--url", relay.url) == 0
        shown = capsys.readouterr()
        assert shown.out == "19\n"
        assert f"for the server at {relay.url}" in shown.err


def test_waiting_for_nobody_ends_with_3_and_says_what_is_missing(capsys) -> None:
    assert exit_code("hello", *NOBODY, "--wait", "0.5") == 3
    said = " ".join(capsys.readouterr().err.split())
    assert "no server was ready within 0.5 s: no server answers at 127.0.0.1:9" in said
    assert "nvlm serve" in said


def test_what_had_come_of_an_answer_stays_when_it_fails(triton, capsys) -> None:
    assert exit_code("fail", "--url", triton.url) == 3
    shown = capsys.readouterr()
    assert shown.out == "19\n"
    assert "oops" in shown.err
    assert exit_code("hang", "--url", triton.url, "--timeout", "0.5", "--json") == 3
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["partial"], error["exit_code"]) == ("19", 3)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("as_json", [False, True])
def test_an_interrupted_question_says_interrupted_and_no_more(triton, how, as_json) -> None:
    command = [*NVLM, "ask", "hang", "--url", triton.url, *(["--json"] if as_json else [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as asking:
        while not triton.requests:
            time.sleep(0.05)
        time.sleep(0.3)
        asking.send_signal(how)
        out, err = asking.communicate(timeout=30)
    assert (asking.returncode, err) == (130, "interrupted\n")
    assert triton.cancelled.wait(10)
    if as_json:
        assert json.loads(out)["error"] == {"message": "interrupted", "hint": None, "exit_code": 130, "partial": "19"}
    else:
        assert out == "19\n"


def test_an_interrupted_wait_says_interrupted() -> None:
    command = [*NVLM, "ask", "hello", *NOBODY, "--wait"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as asking:
        assert asking.stderr is not None
        assert "waiting up to 300 s" in asking.stderr.readline()
        asking.send_signal(signal.SIGINT)
        out, err = asking.communicate(timeout=30)
    assert (asking.returncode, out, err) == (130, "", "interrupted\n")


# what an answer may do to a terminal

EVIL = (
    "a\tb\nred \x1b[31m title \x1b]0;x\x07 c1 \x9b2J bell \x07 back \x08 line\rover "
    "\u202eevil\u2066 \x7f \u2028 é 😀\u200d"
)
TAMED = (
    "a\tb\nred \\x1b[31m title \\x1b]0;x\\x07 c1 \\x9b2J bell \\x07 back \\x08 line\\rover "
    "\\u202eevil\\u2066 \\x7f \\u2028 é 😀\u200d"
)


def on_a_terminal(*arguments: str) -> str:
    """What a terminal gets of stdout and stderr."""
    master, slave = pty.openpty()
    with subprocess.Popen([*NVLM, *arguments], stdout=slave, stderr=slave, stdin=subprocess.DEVNULL) as child:
        os.close(slave)
        shown = b""
        with contextlib.suppress(OSError):  # what Linux says at the end of a terminal
            while data := os.read(master, 65536):
                shown += data
    os.close(master)
    assert child.returncode in (0, 2)
    return shown.decode().replace("\r\n", "\n")


def test_a_terminal_gets_no_control_characters_of_an_answer(triton) -> None:
    assert on_a_terminal("ask", f"say {EVIL}", "--url", triton.url) == f"{TAMED}\n"


def test_a_pipe_gets_the_answer_as_it_is(triton) -> None:
    command = [*NVLM, "ask", f"say {EVIL}", "--url", triton.url]
    done = subprocess.run(command, capture_output=True, timeout=60, env=os.environ | {"PYTHONIOENCODING": "utf-8"})
    assert done.stdout.decode() == f"{EVIL}\n"


def test_an_error_never_brings_control_characters(capsys) -> None:
    exit_code("hello", *NOBODY, "--image", "\x1b]0;x\x07\u202e.png")
    said = capsys.readouterr().err
    assert said == visible(said)
    assert "\\x1b]0;x\\x07\\u202e.png" in said


@given(st.text())
def test_no_text_keeps_a_control_character(text) -> None:
    shown = visible(text)
    assert not [one for one in shown if one not in "\n\t" and (ord(one) < 32 or 127 <= ord(one) < 160)]
    assert not set(shown) & set(map(chr, (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C)))
    assert visible(shown) == shown


@given(st.text(alphabet=st.characters(exclude_categories=["Cc", "Cf", "Cs", "Zl", "Zp"])))
def test_ordinary_text_is_shown_as_it_is(text) -> None:
    assert visible(text) == text


def test_only_a_terminal_needs_escapes(tmp_path) -> None:
    with (tmp_path / "file").open("w") as file:
        assert for_output("\x1b", file) == "\x1b"
