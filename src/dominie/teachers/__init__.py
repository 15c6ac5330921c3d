"""Teachers turn a batch into a signal: one forward pass a row, by the teacher of its source."""

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
