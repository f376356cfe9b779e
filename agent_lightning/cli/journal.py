"""`agl journal check`: what a journal holds, and whether it is intact. It only reads."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from rich.console import Console

from agent_lightning.buffer.codec import kind_of
from agent_lightning.buffer.ledger import Ledger
from agent_lightning.buffer.segments import list_segments, segment_readers
from agent_lightning.buffer.store import apply_record
from agent_lightning.core.errors import JournalError, UserError


def check(path: Path) -> int:
    """Print what the journal of a run holds. Returns the exit code 0; a torn end, which a crash leaves, is no damage.

    Raises UserError if it is damaged, made by a newer version, or no journal; the message names file and byte.
    """
    folder = path / "journal" if (path / "journal").is_dir() else path
    if not folder.is_dir() or not list_segments(folder):
        raise UserError(f"{path} holds no journal: give a run's folder, or a folder of segments")
    kinds, last, error = Counter[str](), None, None
    ledger = Ledger(keeps_taken=True, memory_bytes=0)
    try:
        for last in segment_readers(folder):
            for location, payload in last.records():
                apply_record(ledger, payload, location, folder)
                kinds[kind_of(payload)] += 1
    except JournalError as damage:
        error = damage
    console = Console(soft_wrap=True, highlight=False)
    size = sum(segment.path.stat().st_size for segment in list_segments(folder))
    console.print(f"{folder}: {len(list_segments(folder))} segments, {size} bytes, {kinds.total()} records")
    for kind, number in sorted(kinds.items()):
        console.print(f"  {kind:14} {number}")
    for stage in ("open", "taken", "trained", "orphaned"):
        groups = [group for group in ledger.groups.values() if group.stage == stage]
        phases = Counter(rollout.phase for group in groups for rollout in group.rollouts)
        counted = ", ".join(f"{number} {phase}" for phase, number in sorted(phases.items()))
        console.print(f"{stage:8} {len(groups)} groups{': rollouts ' + counted if counted else ''}")
    if error is not None:
        raise UserError(str(error)) from error
    if last is not None and last.torn:
        console.print(f"{last.segment.path} has a torn end of {last.torn} bytes at byte {last.end}: it will be cut")
    console.print("ok")
    return 0
