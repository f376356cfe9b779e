"""The exceptions that this package raises on purpose: one tree, whose branches are named after boundaries."""

from __future__ import annotations

from pathlib import Path


class AgentLightningError(Exception):
    """The root of the tree."""


class UserError(AgentLightningError):
    """Bad input from a person. The message is one line that says what to do; the exit code is 2."""


class ConfigError(UserError):
    """A config key, type or value that cannot be used. The message names the key's path."""


class DataError(UserError):
    """A task file or row that cannot be read. The message names file and line."""


class RolloutError(AgentLightningError):
    """A fault of one rollout, which becomes its outcome and never ends the run."""


class UnknownRollout(RolloutError):
    """The key is not open: it was never admitted, has ended, or names an older attempt."""


class OverBudget(RolloutError):
    """An attempt has recorded as many bytes as it may."""


class RewardError(RolloutError):
    """The reward is no finite number."""


class RewardConfigError(RewardError):
    """The reward does not fit the config, its range or its weights: the run stops. The message names the keys."""


class AgentProcessError(RolloutError):
    """The agent's process ended with an error; `trace` has the frames of it, if they are known."""

    def __init__(self, message: str, trace: str = "") -> None:
        super().__init__(message)
        self.trace = trace


class JournalError(AgentLightningError):
    """The journal cannot be written or read. The message names the file and says what to do."""


class JournalDamaged(JournalError):
    """A record before the journal's end is broken: neither it nor any record after it can be trusted."""

    def __init__(self, path: Path, offset: int, why: str) -> None:
        super().__init__(path, offset, why)  # what pickle passes to this method again
        self.path, self.offset, self.why = path, offset, why

    def __str__(self) -> str:
        return f"{self.path} is damaged at byte {self.offset}: {self.why}"


class JournalFull(JournalError):
    """The journal has reached its size limit: new rollouts and calls are refused, running attempts may end."""


class PartDied(AgentLightningError):
    """A process that the run needs has died; the run resumes from a checkpoint. The message names the process."""


class EngineError(AgentLightningError):
    """The policy's engine could not do its work."""


class GapError(AgentLightningError):
    """Engine and learner do not agree on the log-probabilities of sampled tokens. The message says what is likely."""


class RunFailed(AgentLightningError):
    """A run that the Python API started in a process of its own ended without its result. The message is the process's
    last line."""


class Stopped(AgentLightningError):
    """A signal has ended the work in order. A run has written its checkpoint."""


class StepFailed(AgentLightningError):
    """Every rollout of a step failed. The message counts the reasons."""


class AccountingError(AgentLightningError):
    """A fault of this package: rollouts or tokens received != trained + dropped. The message has the totals."""
