"""Data2Parquet on Dagster: JSON log records in, validated and partitioned Parquet out."""

__version__ = "0.1.0"
