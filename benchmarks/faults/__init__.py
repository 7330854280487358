"""Runs that faults are injected into."""
