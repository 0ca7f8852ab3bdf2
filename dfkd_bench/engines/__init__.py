"""Engines run jobs somewhere and restart what died. State lives in the run's folder, never in an engine."""
