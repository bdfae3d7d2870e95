"""A rank ends before Python's interpreter is taken down, where gloo's threads would abort it."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import atexit, sys
from mamba3_train.training import process_end

class Last:
    def __del__(self):
        print("taken down")

last = Last()
with process_end.at_once():
    atexit.register(print, "registered")
    {body}
"""


@pytest.mark.parametrize(
    ("body", "code"),
    [("pass", 0), ("sys.exit()", 0), ("sys.exit(85)", 85), ("sys.exit('a mistake')", 1), ("1 / 0", 1)],
)
@pytest.mark.parametrize("alone", [True, False])
def test_the_exit_code_and_what_is_still_done(body, code, alone):
    environment = {key: value for key, value in os.environ.items() if key != "RANK"}
    environment |= {} if alone else {"RANK": "1"}
    command = [sys.executable, "-c", SCRIPT.format(body=body)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == code, result.stderr
    assert result.stdout == "registered\n" + "taken down\n" * alone
    assert ("a mistake" in result.stderr, "ZeroDivisionError" in result.stderr) == ("mistake" in body, "/" in body)
