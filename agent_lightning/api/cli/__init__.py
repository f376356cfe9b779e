"""The commands of `agl`, and their exit codes beside 0."""

FAILED = 1
USER_ERROR = 2
STOPPED = 130
"""A signal has ended the command; a run has written its checkpoint."""
