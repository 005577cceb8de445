"""Put on the path of a system under test: Dagster's daemon looks at backfills every 30 s, and has no setting for it."""

import sys

if "dagster._daemon" in sys.orig_argv:
    from dagster._daemon import controller

    controller.DEFAULT_DAEMON_INTERVAL_SECONDS = 2
