"""Teachers turn a batch into distillation targets: local, sharing the student's base, or cached."""

from dominie.deprecated import renamed
from dominie.losses.targets import Part, Signal
from dominie.teachers.ahead import TeacherPrefetch
from dominie.teachers.teacher import AdapterTeacher, LocalTeacher, RoutedTeacher, Teacher

__all__ = [
    "AdapterTeacher",
    "LocalTeacher",
    "Part",
    "RoutedTeacher",
    "Signal",
    "Teacher",
    "TeacherPrefetch",
]

__getattr__ = renamed(__name__, {"MindTeacher": "AdapterTeacher"})
