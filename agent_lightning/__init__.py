"""Agent Lightning on Ray: reinforcement learning for any LLM agent."""

__version__ = "0.1.0"
