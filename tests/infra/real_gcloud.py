"""Gives many command lines to the installed gcloud in one process, which takes seconds to start.

Run as a script with the path of gcloud: reads a JSON list of words on each line, and answers each with a JSON
list of its exit code and what it said.
"""

import json
import os
import sys
import tempfile
from pathlib import Path


def main(folder: str) -> None:
    sys.path[:0] = [f"{folder}/lib", f"{folder}/lib/third_party"]
    from googlecloudsdk import gcloud_main  # type: ignore[import-not-found]

    command_line = gcloud_main.CreateCLI([])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    for line in sys.stdin:
        with tempfile.TemporaryFile("w+") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            code = 0
            try:
                command_line.Execute(json.loads(line))
            except SystemExit as end:
                code = int(end.code or 0)
            sys.stderr.flush()
            said.seek(0)
            answers.write(json.dumps([code, said.read()]) + "\n")


if __name__ == "__main__":
    main(str(Path(sys.argv[1]).resolve().parents[1]))
