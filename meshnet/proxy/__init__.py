"""THE SIDECAR. `outbound.py` and `inbound.py` each read as one connection's life; `app.py` starts everything."""
