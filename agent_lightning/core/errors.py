"""One exception tree, named after boundaries.

* AgentLightningError
  + UserError           bad input from a person: one line, exit code 2
    - ConfigError       a key, a type or a value of the config
    - DataError         a task file or row
  + RolloutError        a fault of one rollout; becomes its outcome, never a crash
    - UnknownRollout    a key that is not open: never admitted, ended, or of an older attempt
    - RewardError       a reward that is not a number in the declared range
    - AgentProcessError the agent's process died
  + JournalError        the journal cannot be written or read
    - JournalDamaged    a broken record in the middle of it
    - JournalFull       it has reached its limit on disk
  + PartDied            a process that the run needs has died; the run resumes from a checkpoint
  + EngineError         the policy's engine could not do its work
  + StepFailed          all rollouts of a step failed: the run stops, with the reasons counted
  + AccountingError     rollouts or tokens received != trained + dropped: a fault of this package
"""

from __future__ import annotations

from pathlib import Path


class AgentLightningError(Exception):
    """The root of all errors that this package raises on purpose."""


class UserError(AgentLightningError):
    """Bad input from a person. The message is one line that says what to do."""


class ConfigError(UserError):
    """A config key, type or value that cannot be used. The message names the key's path."""


class DataError(UserError):
    """A task file or row that cannot be read. The message names file and line."""


class RolloutError(AgentLightningError):
    """A fault of one rollout, which becomes its outcome."""


class UnknownRollout(RolloutError):
    """The key is not open: it was never admitted, has ended, or names an older attempt."""


class RewardError(RolloutError):
    """The reward is not a finite number in the declared range."""


class AgentProcessError(RolloutError):
    """The agent's process ended with an error."""


class JournalError(AgentLightningError):
    """The journal cannot be written or read. The message names the file and says what to do."""


class JournalDamaged(JournalError):
    """A record before the journal's end is broken: neither it nor any record after it can be trusted."""

    def __init__(self, path: Path, offset: int, why: str) -> None:
        super().__init__(f"{path} is damaged at byte {offset}: {why}")
        self.path = path
        self.offset = offset
        self.why = why

    def __reduce__(self) -> tuple[type[JournalDamaged], tuple[Path, int, str]]:
        return JournalDamaged, (self.path, self.offset, self.why)


class JournalFull(JournalError):
    """The journal has reached its size limit: new rollouts and calls are refused, running attempts may end."""


class PartDied(AgentLightningError):
    """A process that the run needs has died. The message names it."""


class EngineError(AgentLightningError):
    """The policy's engine could not do its work."""


class StepFailed(AgentLightningError):
    """Every rollout of a step failed. The message counts the reasons."""


class AccountingError(AgentLightningError):
    """The rollouts or tokens received are not the sum of those trained and dropped. The message has the totals."""
