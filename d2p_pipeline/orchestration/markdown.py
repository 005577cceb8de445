"""What records bring into the metadata that Dagster's UI renders as Markdown."""

from d2p_pipeline.logs import plain


def code(text: object) -> str:
    """Text as code, in which links, images and HTML mean nothing to whoever renders it; empty text as it is."""
    inside = plain(text).replace("`", "'").replace("|", "\\|")
    return f"`{inside}`" if inside else ""
