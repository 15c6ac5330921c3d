"""One target under atheris: `guided.py TARGET RUNS FOLDER`, inputs steered to new branches."""

from __future__ import annotations

import sys
from pathlib import Path

import atheris


def main() -> None:
    name, runs, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    with atheris.instrument_imports(include=["dominie"]):
        from targets import SEEDS, TARGETS
    corpus = folder / "corpus"
    corpus.mkdir(parents=True)
    for number, seed in enumerate(SEEDS[name]):
        (corpus / str(number)).write_bytes(seed)
    options = [f"-runs={runs}", "-seed=1", "-max_len=4096", "-rss_limit_mb=6000", "-timeout=60"]
    atheris.Setup(
        [sys.argv[0], *options, f"-artifact_prefix={folder}/", str(corpus)], TARGETS[name]
    )
    atheris.Fuzz()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
