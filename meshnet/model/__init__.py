"""WHAT THINGS ARE: frozen msgspec structs and the checks that belong to them. No I/O, no clock."""

import msgspec


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel", omit_defaults=False):
    """The base of every struct a user can write or read: camelCase outside, unknown fields refused."""
