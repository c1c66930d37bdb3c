"""Which model families can be compressed, and how a family is looked up."""

from ptq.architectures.families import FAMILIES
from ptq.architectures.geometry import Geometry, geometry_of
from ptq.architectures.lookup import has_experts, spec_for
from ptq.architectures.spec import ExpertsSpec, FusedQKV, Refusal, Spec

__all__ = [
    "FAMILIES",
    "ExpertsSpec",
    "FusedQKV",
    "Geometry",
    "Refusal",
    "Spec",
    "geometry_of",
    "has_experts",
    "spec_for",
]
