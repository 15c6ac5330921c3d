"""Teachers turn a batch into distillation targets: local, sharing the student's base, or cached."""

from dominie.losses.targets import Part, Signal
from dominie.teachers.routed import RoutedTeacher, TeacherPrefetch
from dominie.teachers.teacher import LocalTeacher, MindTeacher, Teacher

__all__ = [
    "LocalTeacher",
    "MindTeacher",
    "Part",
    "RoutedTeacher",
    "Signal",
    "Teacher",
    "TeacherPrefetch",
]
