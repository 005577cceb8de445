"""The doors records come in by: HTTP, files, the generator. A door answers yes only when the buffer has the record."""
