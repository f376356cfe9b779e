"""Agent Lightning on Ray: reinforcement learning for any LLM agent.

What an agent's own code may use is here: `from agent_lightning import tool, emit_reward, current_rollout`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["__version__", "current_rollout", "emit_reward", "tool"]

if TYPE_CHECKING:
    from agent_lightning.rollouts.client import current_rollout, emit_reward, tool


def __getattr__(name: str) -> object:
    """Import the public names when they are first used: OpenTelemetry would slow down every import of the package."""
    if name in __all__:
        return getattr(import_module("agent_lightning.rollouts.client"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
