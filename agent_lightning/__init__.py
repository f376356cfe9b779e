"""Agent Lightning on Ray: reinforcement learning for any LLM agent.

From a script or a notebook:

    import agent_lightning as agl

    run = agl.train(agent=solve, reward=score, train=rows, model="path/or/hub-id", steps=20)
    result = agl.evaluate(agent=solve, reward=score, tasks=held_out, model="path/or/hub-id")
    with agl.serve(model="path/or/hub-id") as policy: ...
    run = agl.load_run("runs/first")

In an agent's own code: `from agent_lightning import tool, emit_reward, current_rollout`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = [
    "Run",
    "RunFailed",
    "__version__",
    "current_rollout",
    "emit_reward",
    "evaluate",
    "load_run",
    "serve",
    "sweep",
    "tool",
    "train",
]

if TYPE_CHECKING:
    from agent_lightning.cli.api import Run, RunFailed, evaluate, load_run, serve, sweep, train
    from agent_lightning.rollouts.client import current_rollout, emit_reward, tool


def __getattr__(name: str) -> object:
    """Import the public names when they are first used: OpenTelemetry would slow down every import of the package."""
    if name in ("current_rollout", "emit_reward", "tool"):
        return getattr(import_module("agent_lightning.rollouts.client"), name)
    if name in __all__:
        return getattr(import_module("agent_lightning.cli.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
