"""Composition root and operator commands."""
