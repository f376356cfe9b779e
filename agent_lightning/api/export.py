"""What leaves a run: its trained model in Hugging Face's format, and its rollouts as files of other tools."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from agent_lightning.config.load import reload
from agent_lightning.config.running import Dtype
from agent_lightning.core.errors import UserError
from agent_lightning.launch.hub import find_model
from agent_lightning.run import state, storage
from agent_lightning.run.archive import read_origins, read_trajectories
from agent_lightning.run.tracking import RunDirectory
from agent_lightning.spans.traces import export

logger = logging.getLogger(__name__)


def export_rollouts(place: str | Path, out: Path, format: export.Format) -> str:
    """Write the rollouts of a run, a folder or a remote place, to a file in the folder `out`; returns a line that says
    what is written. Raises DataError, UserError."""
    with _local(str(place), without="checkpoints") as run:
        path, count = export.write(read_trajectories(run), out, format, read_origins(run))
    return f"{path}: {count} rollouts"


def export_model(
    place: str | Path,
    target: Path,
    *,
    step: int | None = None,
    dtype: Dtype | None = None,
    shard_size: str = "5GB",
    merged: bool = False,
) -> str:
    """Write the policy of a run's newest checkpoint, or of the checkpoint of `step`, to the new folder `target`, with
    LoRA its adapter unless `merged`; in the run's `model.dtype` unless `dtype` is given. Returns a line that says what
    is written. Raises UserError."""
    from agent_lightning.learners import export as learner  # it imports torch

    with _local(str(place), without="rollouts") as run:
        directory = RunDirectory.open(run)
        config = reload(directory.config, ())
        if config.model.words:
            raise UserError(f"{run}: a toy model is a table, and has no form that Transformers would load")
        checkpoints, dtype = directory.checkpoints, dtype or config.model.dtype
        folder = state.newest_checkpoint(checkpoints) if step is None else state.checkpoint_folder(checkpoints, step)
        if step is not None and (damage := state.find_damage(folder)):
            names = ", ".join(path.name for path in state.complete_checkpoints(checkpoints))
            raise UserError(f"{damage}; complete checkpoints: {names or 'none'}")
        original = None
        try:
            original = Path(find_model(config.model.path))
        except UserError as error:
            logger.warning("%s; config and tokenizer are taken from the checkpoint", error)
        if merged and not config.model.lora.rank:
            raise UserError(f"--merged: {run} was trained without LoRA; leave it out")
        number = learner.export_model(folder, original, target, dtype=dtype, shard_size=shard_size, merged=merged)
        what = "adapter" if config.model.lora.rank and not merged else "policy"
        return f"{target}: the {what} after step {state.read_state(folder).step}, {number} parameters, {dtype}"


@contextmanager
def _local(place: str, *, without: str) -> Iterator[Path]:
    """The folder of a run; of one at a remote place a copy, without files below `without`, while the block runs."""
    with TemporaryDirectory(prefix="agl-export-") as copies:
        is_remote = storage.is_remote(place)
        yield storage.fetch(place, Path(copies), without=without) if is_remote else storage.local_root(place)
