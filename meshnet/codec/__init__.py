"""HOW THINGS LOOK AS BYTES, or as text: parsers and printers that never touch a socket or a file."""
