"""The console entry point.

What `d2p convert` converts with takes longer to load than everything else, so that is begun before the commands are imported.
"""

import gc
import importlib
import sys

# What both processes of `d2p convert` come to import, by way of pydantic, Polars and pyarrow too: they part after it.
_OF_BOTH = ("d2p_pipeline.ingest.convert", "importlib.metadata", "ssl")


def main() -> None:
    # What a command imports is no garbage; looking for some would take a tenth of its start.
    gc.set_threshold(50_000)
    early = None
    is_convert = sys.argv[1:2] == ["convert"]
    if is_convert:
        for name in _OF_BOTH:
            importlib.import_module(name)
        from d2p_pipeline.ingest import workers

        # Options and their values are not told from files here: what is no file counts for nothing.
        early = workers.for_files(sys.argv[2:], workers.cores(), fork=True)

    from d2p_pipeline.cli.app import app

    try:
        app(obj=early)
    finally:
        if is_convert:
            gc.freeze()  # nothing is used again, yet Python would look through all of it before it ends


if __name__ == "__main__":
    main()
