"""The one family of errors a steering request can cause.

Every error names what was wrong (`message`), where (`param`, a JSON path such as
`steering.methods[0].heads`) and why in one stable word (`Reason`), so that a client can react to
it without parsing prose.
"""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Stable error words; the part of an error that clients may branch on."""

    UNKNOWN_METHOD = "E_UNKNOWN_METHOD"
    BAD_PARAM = "E_BAD_PARAM"
    LAYER_RANGE = "E_LAYER_RANGE"
    HEAD_RANGE = "E_HEAD_RANGE"
    NO_IMAGE = "E_NO_IMAGE"
    NO_SINK_DIMS = "E_NO_SINK_DIMS"
    CONFLICT = "E_CONFLICT"
    PROMPT_TOO_LONG = "E_PROMPT_TOO_LONG"
    PRESET_NOT_FOUND = "E_PRESET_NOT_FOUND"
    PROFILE_NOT_FOUND = "E_PROFILE_NOT_FOUND"
    PROFILE_MISMATCH = "E_PROFILE_MISMATCH"
    REQUEST_NOT_FOUND = "E_REQUEST_NOT_FOUND"
    ALREADY_GIVEN = "E_ALREADY_GIVEN"
    IN_USE = "E_IN_USE"
    FORBIDDEN = "E_FORBIDDEN"
    UNAUTHORIZED = "E_UNAUTHORIZED"
    QUANTIZED = "E_QUANTIZED"
    UNSUPPORTED = "E_UNSUPPORTED"
    TOO_LARGE = "E_TOO_LARGE"
    TIMEOUT = "E_TIMEOUT"
    CAPACITY = "E_CAPACITY"
    STEERING_FAILED = "E_STEERING_FAILED"
    UNAVAILABLE = "E_UNAVAILABLE"


HTTP_STATUS: dict[Reason, int] = {
    Reason.UNAUTHORIZED: 401,
    Reason.FORBIDDEN: 403,
    Reason.PRESET_NOT_FOUND: 404,
    Reason.PROFILE_NOT_FOUND: 404,
    Reason.REQUEST_NOT_FOUND: 404,
    Reason.TIMEOUT: 408,
    Reason.IN_USE: 409,
    Reason.ALREADY_GIVEN: 409,
    Reason.TOO_LARGE: 413,
    Reason.CAPACITY: 429,
    Reason.STEERING_FAILED: 500,
    Reason.UNAVAILABLE: 503,
}
"""HTTP status of a reason; 400 where it is not listed."""


class SteeringError(ValueError):
    """A steering request that cannot be carried out as asked.

    A `ValueError`, so that vLLM's offline API reports it to the caller instead of treating it as
    an engine failure.
    """

    def __init__(self, reason: Reason, message: str, param: str = "steering") -> None:
        super().__init__(f"{param}: {message}")
        self.reason = reason
        self.message = message
        self.param = param

    @property
    def status(self) -> int:
        """HTTP status code of this error."""
        return HTTP_STATUS.get(self.reason, 400)
