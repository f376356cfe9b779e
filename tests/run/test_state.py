"""The state of a checkpoint comes back as it was written, and an interrupted save is not a checkpoint."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from agent_lightning.core.errors import UserError
from agent_lightning.run.state import (
    STATE_FILE,
    State,
    checkpoint_folder,
    find_damage,
    newest_checkpoint,
    read_state,
    write_state,
)
from agent_lightning.run.tasks import TaskCursor


def full_state() -> State:
    state = State(cursor=TaskCursor(seed=3, epoch=1, position=17))
    state.step, state.version, state.next_group = 12, 11, {"train": 192, "val": 40}
    state.val_rewards = [(0, 0.25), (10, 0.5)]
    state.admitted, state.trained = 1536, 1500
    state.dropped = Counter({"no_spread": 30, "masked_timeout": 6})
    state.failed = Counter({"timeout": 6})
    state.sampled_tokens, state.trained_tokens = 40_000, 39_000
    state.gap_total, state.gap_count, state.gap_max = 12.5, 39_000.0, 0.125
    state.seconds.update({"total": 61.5, "generate": 40.25})
    state.wall_s = 75.0
    return state


@pytest.mark.parametrize("state", [State(cursor=TaskCursor(seed=0)), full_state()], ids=["fresh", "full"])
def test_a_state_comes_back_as_it_was_written(state: State, tmp_path: Path) -> None:
    write_state(tmp_path, state)
    read = read_state(tmp_path)
    assert read == state
    # Equal is not enough, as a Counter equals a dict: the loop goes on counting in these.
    for counts in (read.dropped, read.failed, read.seconds):
        counts.update({"new": 2})
        counts.update({"new": 3})
        assert counts["new"] == 5


def test_a_cursor_comes_back_at_its_position(tmp_path: Path) -> None:
    state = full_state()
    write_state(tmp_path, state)
    assert read_state(tmp_path).cursor == TaskCursor(seed=3, epoch=1, position=17)


def test_writing_again_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    write_state(tmp_path, State(cursor=TaskCursor(seed=0)))
    write_state(tmp_path, full_state())
    assert read_state(tmp_path).step == 12
    assert [file.name for file in tmp_path.iterdir()] == [STATE_FILE]


def test_the_newest_complete_checkpoint_counts(tmp_path: Path) -> None:
    for step in (2, 10, 100):
        folder = checkpoint_folder(tmp_path, step)
        folder.mkdir()
        if step != 100:  # the process died while it saved this checkpoint
            write_state(folder, full_state())
    assert newest_checkpoint(tmp_path) == checkpoint_folder(tmp_path, 10)


def flip(path: Path) -> None:
    """Change a bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "harm", "message"),
    [
        (
            "model_rank_0.pt",
            lambda path: path.write_bytes(path.read_bytes()[:-1]),
            r"model_rank_0\.pt has \d+ bytes, and",
        ),
        ("model_rank_0.pt", Path.unlink, r"model_rank_0\.pt cannot be read \(No such file"),
        ("model_rank_0.pt", flip, r"model_rank_0\.pt does not match its checksums"),
        ("critic/updates", lambda path: path.write_text(""), r"updates has 0 bytes, and was written with 1"),
        ("config.json", lambda path: path.write_text("[}"), r"config\.json is broken \(JSONDecodeError"),
        ("config.json", lambda path: path.write_bytes(b"\xff1"), r"config\.json is broken \(UnicodeDecodeError"),
        ("state.json", lambda path: path.write_text("{"), r"state\.json is broken \(JSONDecodeError"),
        ("state.json", lambda path: path.write_text("[]"), r"state\.json is broken"),
        ("state.json", lambda path: path.write_text("{}"), r"state\.json is broken \(KeyError"),
        ("state.json", lambda path: path.write_bytes(b"\0" * 9), r"state\.json is broken"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    name: str, harm: Callable[[Path], object], message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (2, 10):
        folder = checkpoint_folder(tmp_path, step)
        (folder / "critic").mkdir(parents=True)
        (folder / "critic" / "updates").write_text("3")
        (folder / "config.json").write_text("{}")
        with (folder / "model_rank_0.pt").open("wb") as file:  # an archive, as torch writes them
            np.savez(file, weight=np.arange(1000))
        write_state(folder, full_state())
        assert find_damage(folder) == ""
    harm(checkpoint_folder(tmp_path, 10) / name)
    assert newest_checkpoint(tmp_path) == checkpoint_folder(tmp_path, 2)
    (record,) = caplog.records
    assert re.search(message, record.getMessage())
    assert "\n" not in record.getMessage()
    harm(checkpoint_folder(tmp_path, 2) / name)
    with pytest.raises(UserError, match=r"holds only damaged checkpoints .*: nothing to resume from"):
        newest_checkpoint(tmp_path)


@pytest.mark.parametrize("exists", [True, False])
def test_without_a_complete_checkpoint_there_is_nothing_to_resume(exists: bool, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    if exists:
        checkpoint_folder(folder, 4).mkdir(parents=True)
    with pytest.raises(UserError, match="nothing to resume from"):
        newest_checkpoint(folder)
