"""Mutants that compute the same as the rule: why, and which."""

EQUIVALENT: dict[str, list[str]] = {}
