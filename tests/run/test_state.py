"""The state of a checkpoint comes back as it was written, and an interrupted save is not a checkpoint."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from agent_lightning.core.errors import UserError
from agent_lightning.run.state import STATE_FILE, State, checkpoint_folder, newest_checkpoint, read_state, write_state
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


@pytest.mark.parametrize("exists", [True, False])
def test_without_a_complete_checkpoint_there_is_nothing_to_resume(exists: bool, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    if exists:
        checkpoint_folder(folder, 4).mkdir(parents=True)
    with pytest.raises(UserError, match="nothing to resume from"):
        newest_checkpoint(folder)
