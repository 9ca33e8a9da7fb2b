"""THE CONTROL PLANE. Today it is the authority that issues certificates; discovery and policy are files."""
