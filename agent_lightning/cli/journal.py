"""`agl journal check`: what a journal holds, and whether it is intact. It only reads."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from rich.console import Console

from agent_lightning.buffer.codec import decode, kind_of
from agent_lightning.buffer.ledger import Ledger
from agent_lightning.buffer.segments import Reading, listed, readings
from agent_lightning.core.errors import JournalDamaged, JournalError, UserError


def check(path: Path) -> int:
    """Print what the journal of a run holds. Returns the exit code 0; a torn end, which a crash leaves, is no damage.

    Raises UserError if it is damaged, made by a newer version, or no journal; the message names file and byte.
    """
    folder = path / "journal" if (path / "journal").is_dir() else path
    if not folder.is_dir() or not listed(folder):
        raise UserError(f"{path} holds no journal: give a run's folder, or a folder of segments")
    kinds, last, error = Counter[str](), None, None
    ledger = Ledger(keeps=True, memory_bytes=0)
    try:
        for last in readings(folder):
            _read(last, ledger, kinds)
    except JournalError as damage:
        error = damage
    console = Console(soft_wrap=True, highlight=False)
    size = sum(segment.path.stat().st_size for segment in listed(folder))
    console.print(f"{folder}: {len(listed(folder))} segments, {size} bytes, {kinds.total()} records")
    for kind, number in sorted(kinds.items()):
        console.print(f"  {kind:14} {number}")
    for stage in ("open", "taken", "trained", "left"):
        groups = [group for group in ledger.groups.values() if group.stage == stage]
        phases = Counter(rollout.state.phase for group in groups for rollout in group.rollouts)
        counted = ", ".join(f"{number} {phase}" for phase, number in sorted(phases.items()))
        console.print(f"{stage:8} {len(groups)} groups{': rollouts ' + counted if counted else ''}")
    if error is not None:
        raise UserError(str(error)) from error
    if last is not None and last.torn:
        console.print(f"{last.segment.path} has a torn end of {last.torn} bytes at byte {last.end}: it will be cut")
    console.print("ok")
    return 0


def _read(reading: Reading, ledger: Ledger, kinds: Counter[str]) -> None:
    """Replay the records of a segment into the ledger. Raises JournalError."""
    for place, payload in reading.records():
        try:
            ledger.apply(decode(payload), place)
        except (ValueError, KeyError, IndexError) as error:
            why = f"it does not fit what is before it ({type(error).__name__}: {error})"
            raise JournalDamaged(reading.segment.path, place.offset, why) from error
        kinds[kind_of(payload)] += 1
