"""One exception tree, named after boundaries.

* AgentLightningError
  + UserError           bad input from a person: one line, exit code 2
    - ConfigError       a key, a type or a value of the config
    - DataError         a task file or row
  + RolloutError        something a rollout did; becomes an outcome, never a crash
    - UnknownRollout    a key that is not open: never admitted, ended, or an older attempt
    - RewardError       a reward that is not a number in the declared range
    - AgentProcessError the agent's process died
  + JournalError        the journal cannot be written or read
    - JournalDamaged    a broken record in the middle of it
    - JournalFull       it has reached its limit on disk
  + PartDied            a process that the run cannot do without is gone; it goes on from a checkpoint
  + EngineError         the policy's engine could not do what was asked
  + StepFailed          a whole step of rollouts failed: the run stops, with the reasons counted
  + BooksError          what came in is not what was trained and dropped: a fault of this package
"""

from __future__ import annotations

from pathlib import Path


class AgentLightningError(Exception):
    """Root of everything this package raises on purpose."""


class UserError(AgentLightningError):
    """Bad input from a person. The message is one line that says what to do."""


class ConfigError(UserError):
    """A config key, type or value that cannot be used. The message names the key's path."""


class DataError(UserError):
    """A task file or row that cannot be read. The message names file and line."""


class RolloutError(AgentLightningError):
    """Something a rollout did. Becomes an outcome."""


class UnknownRollout(RolloutError):
    """The key is not open: never admitted, already ended, or of an older attempt."""


class RewardError(RolloutError):
    """The reward is not a finite number in the declared range."""


class AgentProcessError(RolloutError):
    """The agent's process ended with an error."""


class JournalError(AgentLightningError):
    """The journal cannot be written or read. The message names the file and says what to do."""


class JournalDamaged(JournalError):
    """A record is broken that is not the torn end: nothing from there on is believed."""

    def __init__(self, path: Path, offset: int, why: str) -> None:
        super().__init__(f"{path} is damaged at byte {offset}: {why}")
        self.path = path
        self.offset = offset
        self.why = why

    def __reduce__(self) -> tuple[type[JournalDamaged], tuple[Path, int, str]]:
        return JournalDamaged, (self.path, self.offset, self.why)


class JournalFull(JournalError):
    """The journal may not grow: new rollouts and calls are refused, what runs may end."""


class PartDied(AgentLightningError):
    """A process that the run cannot do without is gone. The message names it."""


class EngineError(AgentLightningError):
    """The policy's engine could not do what was asked."""


class StepFailed(AgentLightningError):
    """Every rollout of a step failed. The message counts the reasons."""


class BooksError(AgentLightningError):
    """Rollouts or tokens that came in are neither trained nor dropped, or both. The message has the totals."""
