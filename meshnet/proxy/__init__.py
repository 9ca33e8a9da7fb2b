"""THE SIDECAR. `outbound.py` and `inbound.py` each read as one connection's life; `app.py` starts everything.

`sidecar.py` is what runs in each process, `front.py` what an operator reaches, and `workers` many processes as one.
"""
