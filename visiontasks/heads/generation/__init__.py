"""Generators, and what makes a backbone their critic."""
