"""Model families as data: one TOML table each, and the reader of those tables."""

from dslm.families.family import Family, Tensor, family_names, family_of, load_family

__all__ = ["Family", "Tensor", "family_names", "family_of", "load_family"]
