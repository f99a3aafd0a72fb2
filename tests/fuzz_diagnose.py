"""Coverage-guided fuzzing of what reads untrusted files. Needs `pip install atheris`; runs until it finds something.

python tests/fuzz_diagnose.py oom_text|snapshot|configs [CORPUS_DIR] [-max_total_time=180 ...libFuzzer flags]

A refusal (InputError, Unplannable) is an answer; any other exception, a hang or too much memory is a find.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import pickle
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris  # type: ignore[import-not-found,import-untyped,unused-ignore]

sys.path.insert(0, str(Path(__file__).parent))
with atheris.instrument_imports(include=["vramplan"]):
    from vramplan.core.audit_config import audit
    from vramplan.core.diagnose import diagnose
    from vramplan.core.holdings import evidence_of, holdings
    from vramplan.core.types import Unplannable
    from vramplan.errors import VramplanError
    from vramplan.sources.foreign import read_foreign
    from vramplan.sources.oom_text import parse as parse_log
    from vramplan.sources.oom_text import read_evidence
    from vramplan.sources.snapshot import parse as parse_snapshot

SUFFIXES = (".json", ".yml", ".toml")


def oom_text(data: bytes) -> None:
    parse_log(data.decode("utf-8", errors="replace"))
    with contextlib.suppress(VramplanError):
        evidence = read_evidence(io.BytesIO(data))
        if evidence is not None:
            diagnose(evidence)


def snapshot(data: bytes) -> None:
    with contextlib.suppress(VramplanError):
        found = parse_snapshot(data, "x")
        held = holdings(found)
        evidence = evidence_of(found, held)
        if evidence is not None:
            diagnose(evidence, holdings=held)


FOLDER = tempfile.TemporaryDirectory()


def configs(data: bytes) -> None:
    path = Path(FOLDER.name) / f"x{SUFFIXES[data[0] % 3 if data else 0]}"
    path.write_bytes(data[1:])
    with contextlib.suppress(VramplanError, Unplannable):
        audit(read_foreign(path))  # without a model: playing steps would take all the time


TARGETS: dict[str, Callable[[bytes], None]] = {"oom_text": oom_text, "snapshot": snapshot, "configs": configs}


def seeds(target: str, folder: Path) -> None:
    """The texts and files of the tests, to start from."""
    here = Path(__file__).parent
    found: list[bytes] = []
    if target == "oom_text":
        import test_oom_text as texts

        made = [*texts.MADE.values(), *texts.SEEN.values()]
        found = [text.encode() for text in (*(text for text, _ in texts.REAL.values()), *(text for _, text, _ in made))]
        found += [gzip.compress(found[0]), found[0].decode().encode("utf-16")]
    elif target == "snapshot":
        from snapshot_tools import out_of_memory, training

        values = [out_of_memory().snapshot(last=6), training(1).snapshot(last=4)]
        found = [pickle.dumps(v, 4) for v in values] + [json.dumps(v).encode() for v in values]
    else:
        for path in sorted((here / "configs").rglob("*")):
            if path.suffix in (".json", ".yml", ".yaml", ".toml"):
                number = 1 if path.suffix == ".yaml" else SUFFIXES.index(path.suffix)
                found.append(bytes([number]) + path.read_bytes())
    for number, data in enumerate(found):
        (folder / f"seed-{number}").write_bytes(data)


def main() -> None:
    target, *flags = sys.argv[1:] or [""]
    if target not in TARGETS:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        seeds(target, Path(folder))
        atheris.Setup([sys.argv[0], *flags, folder, "-rss_limit_mb=2048", "-timeout=20"], TARGETS[target])
        atheris.Fuzz()


if __name__ == "__main__":
    main()
