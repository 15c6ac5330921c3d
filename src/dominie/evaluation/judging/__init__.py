"""Judges: models behind an endpoint that rate answers; no reply of theirs is paid for twice."""
