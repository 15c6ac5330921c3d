"""What a source contains, told by a hash: a renamed file is the same, an edited one is not."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from dominie.data.tables import unreachable, unreadable

if TYPE_CHECKING:
    from dominie.data.sources import Source


def content_fingerprint(source: Source) -> str:
    """Hash of the bytes of a source's files in order, or the revision of a hub data set.

    Raises:
        InputError: the source cannot be read.
    """
    if not source.is_local:
        return f"{source.path}@{_hub_revision(source)}/{source.subset}/{source.split}"
    total = hashlib.sha256()
    for path in source.local_files():
        try:
            with path.open("rb") as file:
                total.update(path.suffix.lower().encode())
                total.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise unreadable(path, error) from error
    return total.hexdigest()


def _hub_revision(source: Source) -> str:
    import huggingface_hub

    try:
        return str(huggingface_hub.HfApi().dataset_info(source.path).sha)
    except Exception as error:  # the hub client raises whatever it pleases
        raise unreachable(source, error) from error
