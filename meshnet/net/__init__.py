"""WHAT LINUX CAN DO: sockets and their options, original destinations, TLS. The only room with socket constants."""
