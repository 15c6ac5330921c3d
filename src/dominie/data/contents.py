"""What a source contains, told by a hash: a renamed file is the same, an edited one is not."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from dominie.data.benchmarks import companion
from dominie.data.tables import unreachable, unreadable

if TYPE_CHECKING:
    from dominie.data.sources import Source


def content_fingerprint(source: Source) -> str:
    """Hash of the bytes of a source's files in order, or the revision of a hub data set.

    Raises:
        InputError: the source cannot be read.
    """
    if not source.is_local:
        revision = f"{source.path}@{_hub_revision(source)}/{source.subset}/{source.split}"
        return _selected(revision, source)
    total = hashlib.sha256()
    for path in source.local_files():
        for part in filter(None, (path, companion(path))):
            try:
                with part.open("rb") as file:
                    total.update(part.suffix.lower().encode())
                    total.update(hashlib.file_digest(file, "sha256").digest())
            except OSError as error:
                raise unreadable(part, error) from error
    return _selected(total.hexdigest(), source)


def _selected(content: str, source: Source) -> str:
    """The content with what is chosen of it; without a choice the content as it is."""
    if source.where is None:
        return content
    return f"{content} where {json.dumps(source.where, sort_keys=True)}"


def _hub_revision(source: Source) -> str:
    import huggingface_hub

    try:
        return str(huggingface_hub.HfApi().dataset_info(source.path).sha)
    except Exception as error:  # the hub client raises whatever it pleases
        raise unreachable(source, error) from error
