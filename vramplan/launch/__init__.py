"""Starts the training child, watches it, and says how it ended. No torch here: the child may die, this stays.

The run folder is the contract between the two: `run.json` (and `plan.json`, `prediction.json`, `model/config.json`) in;
`progress.jsonl`, `measurement.jsonl`, `log.txt`, checkpoints and the adapter out. `lock` holds the pid of whoever works
in it.
"""

from vramplan.launch.child import launch
from vramplan.launch.ending import Outcome
from vramplan.launch.folder import prepare_run_dir

__all__ = ["Outcome", "launch", "prepare_run_dir"]
