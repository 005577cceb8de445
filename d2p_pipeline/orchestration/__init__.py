"""What Dagster sees: batches, runs and files, never records.

`sensor` seals due buffers and asks for runs, `flush` is the run, `io_manager` writes and loads files, `assets` is what the
catalogue shows, `resources` gives ops their parts. The work itself is in `d2p_pipeline.delivery`, which knows no Dagster.
"""
