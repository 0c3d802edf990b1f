"""The records of a run folder: the typed and validated results that each stage leaves for the next.

A `Record` is the content of one JSON file; its parts are `Part`s. Files contain their format number; files of earlier
formats are migrated when they are read (`pairtune.run.schema`).
"""

from __future__ import annotations

from pairtune.run.records.answer_records import (
    Answer,
    AnswersRecord,
    AnswerSummary,
    Choosing,
    Decoding,
    EvaluationReport,
    Generations,
    JudgedAnswers,
    ModelAnswers,
    WinRate,
)
from pairtune.run.records.audit_record import (
    AuditRecord,
    Finding,
)
from pairtune.run.records.base import (
    LEVELS,
    Interval,
    Level,
    Part,
    Record,
    dump,
)
from pairtune.run.records.comparison_record import ComparedModels, Difference
from pairtune.run.records.data_record import (
    DataRecord,
    DecodedPair,
    SourceAccount,
    SplitRecord,
)
from pairtune.run.records.environment_record import (
    BaseModelRecord,
    Environment,
    KernelChoice,
    Machine,
    MachineChoices,
)
from pairtune.run.records.lineage_record import Beginning, Lineage, Parent
from pairtune.run.records.progress_record import Progress
from pairtune.run.records.regression_records import RegressedPair, Regressions
from pairtune.run.records.selection_records import (
    AccuracyOf,
    AgainstBase,
    Comparison,
    ExampleSummary,
    Measured,
    RankedTrial,
    Selection,
    Share,
    TestRecord,
)
from pairtune.run.records.trial_records import (
    Rounding,
    SweepRecord,
    TrialRecord,
    TrialStatus,
    TrialSummary,
)

RECORDS: tuple[type[Record], ...] = (
    Environment,
    Lineage,
    DataRecord,
    SweepRecord,
    Choosing,
    Selection,
    TestRecord,
    Generations,
    Regressions,
    AuditRecord,
)

__all__ = [
    "LEVELS",
    "RECORDS",
    "AccuracyOf",
    "AgainstBase",
    "Answer",
    "AnswerSummary",
    "AnswersRecord",
    "AuditRecord",
    "BaseModelRecord",
    "Beginning",
    "Choosing",
    "ComparedModels",
    "Comparison",
    "DataRecord",
    "DecodedPair",
    "Decoding",
    "Difference",
    "Environment",
    "EvaluationReport",
    "ExampleSummary",
    "Finding",
    "Generations",
    "Interval",
    "JudgedAnswers",
    "KernelChoice",
    "Level",
    "Lineage",
    "Machine",
    "MachineChoices",
    "Measured",
    "ModelAnswers",
    "Parent",
    "Part",
    "Progress",
    "RankedTrial",
    "Record",
    "RegressedPair",
    "Regressions",
    "Rounding",
    "Selection",
    "Share",
    "SourceAccount",
    "SplitRecord",
    "SweepRecord",
    "TestRecord",
    "TrialRecord",
    "TrialStatus",
    "TrialSummary",
    "WinRate",
    "dump",
]
