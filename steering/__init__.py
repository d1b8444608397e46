"""Steering methods and the programs they compile to. Knows neither vLLM nor kernels nor servers."""

from headway.steering.compile import compile_spec
from headway.steering.errors import Reason, SteeringError
from headway.steering.geometry import ModelGeometry
from headway.steering.offline import EXTRA_ARG, sampling_params
from headway.steering.program import SteeringProgram
from headway.steering.schema import SteeringSpec, parse_spec

__all__ = [
    "EXTRA_ARG",
    "ModelGeometry",
    "Reason",
    "SteeringError",
    "SteeringProgram",
    "SteeringSpec",
    "compile_spec",
    "parse_spec",
    "sampling_params",
]
