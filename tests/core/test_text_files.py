"""Errors as one line, hidden secrets, and files that appear complete or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

import agent_lightning
from agent_lightning.core import files, text

SECRET = "0123456789abcdef0123456789abcdef"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("no\nway"), "ValueError: no"),
        (ValueError(""), "ValueError: no message"),
        (ValueError("a\u2028b"), "ValueError: a\u2028b"),
        (ExceptionGroup("two", [KeyError("x"), ValueError("y")]), "KeyError: 'x'"),
        (ValueError("x" * 1000), f"ValueError: {'x' * 288}"),
        (KeyError(), "KeyError: no message"),
    ],
)
def test_an_error_is_one_line(error: Exception, line: str) -> None:
    assert text.error_line(error) == line


def test_an_error_that_is_cut_shows_no_part_of_the_secret() -> None:
    line = text.error_line(ValueError("x" * 280 + SECRET), secret=SECRET)
    assert line == f"ValueError: {'x' * 280}{'*' * 8}"


def test_half_of_a_surrogate_pair_becomes_a_question_mark() -> None:
    assert text.replace_surrogates("a\ud800b") == "a?b"


def test_a_hidden_secret_keeps_the_length_of_the_text() -> None:
    shown = text.hide_secret(f"GET /attempt/1/{SECRET}/v1 {SECRET}", SECRET)
    assert SECRET not in shown
    assert len(shown) == len(f"GET /attempt/1/{SECRET}/v1 {SECRET}")
    assert text.hide_secret("as it is", "") == "as it is"
    assert text.hide_secret(b"\xff" + SECRET.encode(), SECRET) == b"\xff" + b"*" * len(SECRET)


def test_the_secret_of_every_attempt_is_hidden_in_its_url() -> None:
    url = f"http://127.0.0.1:80/rollout/train-0-0/attempt/1/{SECRET}/main/v1"
    assert text.hide_attempt_secrets(url) == "http://127.0.0.1:80/rollout/train-0-0/attempt/1/***/main/v1"


def test_a_file_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    files.write_text(path, "old")

    def write_half() -> None:
        with files.replacing(path) as unfinished:
            unfinished.write_text("ne")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk"):
        write_half()
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]


def test_the_package_offers_what_an_agents_own_code_uses() -> None:
    assert all(hasattr(agent_lightning, name) for name in agent_lightning.__all__)
    with pytest.raises(AttributeError, match="nothing_like_it"):
        agent_lightning.nothing_like_it  # noqa: B018
