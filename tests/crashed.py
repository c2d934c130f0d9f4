"""A test that ends its process ends a run of `--dist loadgroup`, which would else wait for ever.

pytest-xdist 3.8 starts another process and shares out again what the crashed one had, tests that
were done included. A process that is given only such tests has nothing to report, and xdist gives
it more when it does. `conftest.py` calls this.
"""

import pytest


def end_the_run(config: pytest.Config) -> None:
    """Start no process in a crashed one's place, unless `--max-worker-restart` is given."""
    if config.getoption("dist", None) == "loadgroup" and config.option.maxworkerrestart is None:
        config.option.maxworkerrestart = "0"
