"""Runs of main.py with different option values."""
