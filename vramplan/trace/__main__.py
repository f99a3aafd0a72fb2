"""`python -m vramplan.trace`: a request as JSON on stdin, the ledger or the error as JSON on stdout.

A process of its own, so that nothing else imports torch, and so that what is replaced in the libraries meanwhile
(`patches`) is replaced for nobody else. Exit codes as everywhere: 0 done, 1 our error, 2 bad input.
"""

from __future__ import annotations

import io
import json
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

from vramplan.core.ledger import check_run
from vramplan.core.types import GpuProfile, ModelSpec, RunSpec, Unplannable
from vramplan.errors import BAD_INPUT, OK, OUR_ERROR, MissingExtra, VramplanError
from vramplan.sources import records


def main() -> int:
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # the libraries like to talk
            answer = _answer(json.load(sys.stdin))
        code = OK
    except VramplanError as error:
        answer, code = {"error": error.message, "hint": error.hint}, error.exit_code
    except Unplannable as error:
        answer, code = {"error": error.message, "hint": error.hint}, BAD_INPUT
    except Exception as error:
        text = f"the tracer failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        hint = "please report it with the name of the model and the versions of the libraries"
        answer, code = {"error": text[:400], "hint": hint}, OUR_ERROR
    json.dump(answer, sys.stdout)
    return code


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    try:
        from vramplan.trace.ledger import described, estimate
    except ModuleNotFoundError as error:
        raise MissingExtra(f"--trace (it needs {error.name})") from None
    run = records.decode(request["run"], RunSpec)
    gpu = records.decode(request["gpu"], GpuProfile)
    spec = records.decode(request["spec"], ModelSpec) if request["spec"] else None
    check_run(spec or described(request["config"]), run)
    return records.encode(estimate(request["config"], spec, run, gpu, full_depth=request["full_depth"]))


if __name__ == "__main__":
    sys.exit(main())
