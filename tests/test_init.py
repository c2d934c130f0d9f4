"""Importing the package."""

import gc
import subprocess
import sys


def test_garbage_is_collected_after_the_import_if_it_was_before() -> None:
    assert gc.isenabled()
    code = "import gc; gc.disable(); import opsgraph; assert not gc.isenabled()"
    subprocess.run([sys.executable, "-c", code], check=True)
