"""Keys in the environment reach neither the run's folder nor anything that is printed."""

from __future__ import annotations

from faults import SECRETS


def test_no_file_and_no_word_has_a_secret(undisturbed):
    said = undisturbed.ended.said.encode()
    files = [path for path in undisturbed.folder.rglob("*") if path.is_file()]
    assert len(files) > 20
    for secret in SECRETS.values():
        assert secret.encode() not in said
        assert not [path for path in files if secret.encode() in path.read_bytes()]
