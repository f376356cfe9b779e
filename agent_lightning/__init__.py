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
    "sft",
    "sweep",
    "tool",
    "train",
]

if TYPE_CHECKING:
    from agent_lightning.api.calls import evaluate, serve, sft, sweep, train
    from agent_lightning.api.runs import Run, load_run
    from agent_lightning.core.errors import RunFailed
    from agent_lightning.rollouts.client import current_rollout, emit_reward, tool


_MODULES = {
    **dict.fromkeys(("current_rollout", "emit_reward", "tool"), "rollouts.client"),
    **dict.fromkeys(("Run", "load_run"), "api.runs"),
    "RunFailed": "core.errors",
}
"""Where a public name is, unless it is in `api.calls`."""


def __getattr__(name: str) -> object:
    """Import the public names when they are first used: OpenTelemetry would slow down every import of the package."""
    if name in __all__:
        return getattr(import_module(f"agent_lightning.{_MODULES.get(name, 'api.calls')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
