from .answering import ModelInfo
from .library import ServedExample
from .measurement.findings import CurvePoint, Duplicates, Measurement, Suspect
from .refusals import (
    BadExamples,
    Closing,
    DeadlinePassed,
    InputTooLong,
    LibraryFault,
    QueueFull,
    TaskExists,
    UnknownExample,
    UnknownTask,
)
from .registering import Registration
from .requests import Generation, Reply, Ticket, Timing
from .served import Service, open_service
from .served_task import ServedTask
from .settings import ServiceSettings, ShotChoice
from .worker import ServiceStats

__all__ = [
    "BadExamples",
    "Closing",
    "CurvePoint",
    "DeadlinePassed",
    "Duplicates",
    "Generation",
    "InputTooLong",
    "LibraryFault",
    "Measurement",
    "ModelInfo",
    "QueueFull",
    "Registration",
    "Reply",
    "ServedExample",
    "ServedTask",
    "Service",
    "ServiceSettings",
    "ServiceStats",
    "ShotChoice",
    "Suspect",
    "TaskExists",
    "Ticket",
    "Timing",
    "UnknownExample",
    "UnknownTask",
    "open_service",
]
