"""`fit --from FILE`: the plan in the words of the trainer whose file it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vramplan.cli.build import note
from vramplan.core.dialects import OFFLOADS, STYLES, TOOL_NAMES, Rewritten, rewrite
from vramplan.core.types import SEARCHED, Plan
from vramplan.errors import InputError

if TYPE_CHECKING:
    from vramplan.cli.from_file import Origin

YAML = (".yaml", ".yml")


def searched(origin: Origin | None) -> dict[str, Any]:
    """What to search: of another trainer's run only what its file can say."""
    if origin is None or origin.config is None:
        return {}
    return {"styles": STYLES}


def levers_of(origin: Origin | None) -> tuple[str, ...]:
    """The levers that a plan may turn."""
    foreign = origin is not None and origin.config is not None and origin.config.tool not in OFFLOADS
    return tuple(lever for lever in SEARCHED if not (foreign and lever == "checkpoint_offload"))


def in_words(origin: Origin | None, target: Path | None) -> bool:
    """Whether -o is written in the words of the file: a YAML file for YAML, JSON for JSON. Else it is a plan."""
    if origin is None or origin.config is None or target is None:
        return False
    source, ours = Path(origin.path).suffix.lower(), target.suffix.lower()
    if source == ".json" and ours != ".json":
        raise InputError(f"-o {target}: {origin.path} is JSON", "name a .json file")
    return source == ".json" or ours in YAML


def words_of(origin: Origin, plan: Plan, target: Path | None) -> Rewritten:
    """The plan in the file's words; in `target`, if that is given, beside everything else that the file says."""
    from vramplan.sources.foreign_write import write_like
    from vramplan.sources.yaml_file import read_mapping

    config = origin.config
    assert config is not None and config.run is not None
    values = read_mapping(origin.path).values
    change = rewrite(config.tool, values, origin.completed(config.run, plan.ledger.model), plan.run)
    lost = target is not None and write_like(origin.path, target, change.keys)
    was = {key: values.get(key) for key in change.keys}
    return Rewritten(config.tool, origin.path, change, was, str(target) if target else None, lost)


def tell(words: Rewritten) -> None:
    """The same beside JSON, as notes."""
    for key, was, now in words.rows():
        note(f"{words.written or words.source}: {key}: {now} (was {was})")
    for text in words.change.unsaid:
        note(f"{TOOL_NAMES[words.tool]} cannot say {text}")
    if words.comments_lost:
        note(f"{words.written} is without the comments of {words.source}")
