"""Teachers turn a batch into a signal: one forward pass a row, by the teacher of its source."""

from dominie.losses.signal import Part, Signal
from dominie.teachers.ahead import Ahead
from dominie.teachers.base import Teacher
from dominie.teachers.local import LocalTeacher
from dominie.teachers.mind import MindTeacher
from dominie.teachers.routed import RoutedTeacher

__all__ = ["Ahead", "LocalTeacher", "MindTeacher", "Part", "RoutedTeacher", "Signal", "Teacher"]
