"""Live export of finished rollouts, as OpenTelemetry traces, to a collector (docs/traces.md)."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import wait
from queue import SimpleQueue

from opentelemetry.sdk import resources
from opentelemetry.sdk.trace import ReadableSpan, export

from agent_lightning.core.errors import UserError
from agent_lightning.core.text import error_line
from agent_lightning.core.threads import start_thread
from agent_lightning.core.types import Group
from agent_lightning.spans import otlp
from agent_lightning.spans.traces.export import Origin, resource_of, to_spans, trace_name

logger = logging.getLogger(__name__)

_MAX_WAITING = 4
"""Calls of `send` whose rollouts may wait; a run that is faster than its collector keeps no more in memory."""
_REQUEST_SIZE = 2**20
"""Characters from which on a request is sent: collectors refuse large requests, and each costs a round trip."""
_LAST_SECONDS = 3.0
"""Seconds that `close` waits for what is not sent yet."""


class LiveTraces:
    """Sends the rollouts of a run from a thread of its own: no collector slows down a step. What a collector does not
    take is dropped and counted, since the run's folder has every rollout.

    live = from_environment("calc_x-s0")
    live.send(step, groups)
    live.close()
    """

    def __init__(self, exporter: export.SpanExporter, run: str) -> None:
        self._exporter, self._run = exporter, run
        # The user's variables, such as OTEL_SERVICE_NAME, come before what we say of the sender.
        self._resource = resources.Resource(resource_of(run)).merge(resources.OTELResourceDetector().detect())
        self._waiting: SimpleQueue[tuple[int, Sequence[Group]] | None] = SimpleQueue()
        self._given = self._sent = self._dropped = 0
        # Its exporter logs each of its attempts to send.
        self._log = logging.getLogger("opentelemetry.exporter.otlp.proto")
        self._log.setLevel(logging.ERROR)
        self._thread = start_thread(self._work, "live export")

    def send(self, step: int, groups: Sequence[Group]) -> None:
        """Send the rollouts of a step. Returns at once."""
        number = sum(len(group.trajectories) for group in groups)
        self._given += number
        if self._waiting.qsize() < _MAX_WAITING:
            self._waiting.put((step, groups))
        else:
            self._drop(number, "the collector is slower than the run")

    def counts(self) -> dict[str, float]:
        """Metrics: how many rollouts were sent and dropped until now."""
        return {"traces/sent": self._sent, "traces/dropped": self._dropped}

    def close(self) -> None:
        """Send what waits, for at most 3 seconds, and report the number of rollouts that were dropped."""
        self._waiting.put(None)
        wait((self._thread,), _LAST_SECONDS)
        self._exporter.shutdown()  # no more attempts to send
        if lost := self._given - self._sent:
            logger.warning("%d of %d rollouts did not reach the collector of traces", lost, self._given)

    def _work(self) -> None:
        while (waiting := self._waiting.get()) is not None:
            step, groups = waiting
            left, reason = sum(len(group.trajectories) for group in groups), "the collector did not take them"
            try:
                for number, spans in self._requests(step, groups):
                    if self._exporter.export(spans) is not export.SpanExportResult.SUCCESS:
                        break  # a collector that is gone is tried once a step
                    self._sent, left = self._sent + number, left - number
            except Exception as error:  # whatever rollouts hold, those of the next step are sent
                reason = error_line(error)
            if left:
                self._drop(left, reason)

    def _requests(self, step: int, groups: Sequence[Group]) -> Iterator[tuple[int, list[ReadableSpan]]]:
        """Requests of rollouts: their number and their spans."""
        number, size, spans = 0, 0, list[ReadableSpan]()
        for group in groups:
            origin = Origin(run=self._run, step=step, task=group.task.payload)
            for rollout in group.trajectories:
                raw = to_spans(rollout, origin, exact=False)
                spans += otlp.to_sdk(raw, trace_name(rollout, origin), self._resource)
                number, size = number + 1, size + sum(len(str(span.attributes)) for span in raw)
                if size >= _REQUEST_SIZE:
                    yield number, spans
                    number, size, spans = 0, 0, []
        if spans:
            yield number, spans

    def _drop(self, number: int, reason: str) -> None:
        if not self._dropped:  # the first time explains it; the metric counts the others
            logger.warning("rollouts are dropped from the live export (metric traces/dropped): %s", reason)
            self._log.setLevel(logging.CRITICAL)
        self._dropped += number


def from_environment(run: str) -> LiveTraces | None:
    """The live export of the run of this name, to the collector that OpenTelemetry's own variables name; None if they
    name none (https://opentelemetry.io/docs/specs/otel/protocol/exporter/). Raises UserError if a variable has a value
    that cannot be used."""
    settings = {
        name: os.environ.get(f"OTEL_EXPORTER_OTLP_TRACES_{name}") or os.environ.get(f"OTEL_EXPORTER_OTLP_{name}") or ""
        for name in ("ENDPOINT", "PROTOCOL")
    }
    endpoint, protocol = settings["ENDPOINT"], settings["PROTOCOL"] or "http/protobuf"
    is_off = (
        os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or os.environ.get("OTEL_TRACES_EXPORTER") == "none"
    )
    if not endpoint or is_off:
        return None
    if protocol == "grpc":
        try:
            from opentelemetry.exporter.otlp.proto.grpc import trace_exporter as grpc
        except ImportError:
            advice = "install opentelemetry-exporter-otlp-proto-grpc, or set it to http/protobuf"
            raise UserError(f"OTEL_EXPORTER_OTLP_PROTOCOL=grpc: {advice}") from None
        return LiveTraces(grpc.OTLPSpanExporter(), run)
    if protocol != "http/protobuf":
        raise UserError(f"OTEL_EXPORTER_OTLP_PROTOCOL={protocol}: set it to http/protobuf or grpc")
    if not endpoint.startswith(("http://", "https://")):
        raise UserError(f"OTEL_EXPORTER_OTLP_ENDPOINT={endpoint}: it begins with http:// or https://")
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return LiveTraces(OTLPSpanExporter(), run)
