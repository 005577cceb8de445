"""TLS of the doors that listen, by the settings that the receiver and the Forward listener share."""

import ssl

from d2p_pipeline.settings import Settings


def context(settings: Settings) -> ssl.SSLContext | None:
    """What to serve TLS with; None without `tls_cert`. OSError that names the file that cannot be used."""
    if not (settings.tls_cert and settings.tls_key):
        return None
    found = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    found.minimum_version = ssl.TLSVersion.TLSv1_2
    used = f"tls_cert {settings.tls_cert} with tls_key {settings.tls_key}"
    try:
        found.load_cert_chain(settings.tls_cert, settings.tls_key)
        if settings.tls_client_ca:
            used = f"tls_client_ca {settings.tls_client_ca}"
            found.load_verify_locations(settings.tls_client_ca)
            found.verify_mode = ssl.CERT_REQUIRED
    except OSError as error:  # an ssl.SSLError is one, too
        raise OSError(f"{used} cannot be used: {error}") from error
    return found
